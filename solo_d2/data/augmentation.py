"""The augmentations that ``cfg.INPUT`` selects.

Detectron2's crop, resize and flip; or the augmentation of SSD (arXiv 1512.02325) with YOLACT's
published parameters; or that of AdaptIS for Cityscapes. Random numbers come from numpy's global
state, as in Detectron2.
"""

from collections.abc import Sequence

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T

from .cityscapes import cityscapes_augmentations

KINDS = ("default", "ssd", "cityscapes")

# RGB; the mean color of ImageNet, as published
_CANVAS_COLOR = (124, 117, 104)
_MAX_EXPAND = 4.0


def build_augmentations(cfg: CfgNode, is_train: bool) -> list[T.Augmentation | T.Transform]:
    """The augmentations of ``cfg.INPUT``, in the order in which they are applied.

    Raises:
        ValueError: a key of INPUT has an unsupported value.
    """
    options = cfg.INPUT
    # that of EPS is built by ``ImageLabelMapper``, which tests with this one
    if options.AUGMENTATION not in KINDS and (is_train or options.AUGMENTATION != "eps"):
        raise ValueError(
            f"INPUT.AUGMENTATION must be one of {', '.join(KINDS)}, not {options.AUGMENTATION!r}"
        )
    resize, *flips = utils.build_augmentation(cfg, is_train)
    if not is_train:
        return [resize]
    crop = [T.RandomCrop(options.CROP.TYPE, options.CROP.SIZE)] if options.CROP.ENABLED else []
    if options.AUGMENTATION == "default":
        return [*crop, resize, *flips]
    if options.AUGMENTATION == "cityscapes":
        return [*crop, resize, *flips, *cityscapes_augmentations()]
    return [*crop, *_build_ssd(options.FORMAT, options.MASK_FORMAT), *flips, resize]


def _build_ssd(image_format: str, mask_format: str) -> list[T.Augmentation | T.Transform]:
    # importing the project registers PointRend's heads, which are not needed otherwise
    from detectron2.projects.point_rend import ColorAugSSDTransform

    if image_format not in ("RGB", "BGR"):
        raise ValueError(f"INPUT.AUGMENTATION 'ssd' needs RGB or BGR images, not {image_format}")
    if mask_format != "bitmask":
        raise ValueError("INPUT.AUGMENTATION 'ssd' needs INPUT.MASK_FORMAT 'bitmask'")
    fill = _CANVAS_COLOR if image_format == "RGB" else _CANVAS_COLOR[::-1]
    # YOLACT's code has the same photometric steps and ranges, but neither rounds nor clips to bytes
    return [ColorAugSSDTransform(image_format), RandomExpand(_MAX_EXPAND, fill), ConstrainedCrop()]


class WindowTransform(T.Transform):
    """Crop the image to a window, which may extend beyond the image.

    Boxes are clipped to the window. A box whose center is outside becomes empty, because its object
    is dropped from the image. Polygons are only moved: rasterizing clips them.
    """

    def __init__(
        self, x0: int, y0: int, width: int, height: int, fill: Sequence[float] = (0, 0, 0)
    ):
        """
        Args:
            x0, y0: the window's upper left corner in the image; may be negative.
            width, height: size of the window.
            fill: color outside the image, a number per channel. Masks are 0 there.
        """
        super().__init__()
        self._set_attributes(locals())

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        return self._look(img, self.fill if img.ndim == 3 else 0)

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        return self._look(segmentation, 0)

    def _look(self, array: np.ndarray, fill: Sequence[float] | float) -> np.ndarray:
        height, width = array.shape[:2]
        left, top = max(self.x0, 0), max(self.y0, 0)
        part = array[top : max(self.y0 + self.height, 0), left : max(self.x0 + self.width, 0)]
        if part.shape[:2] == (self.height, self.width):
            return part
        canvas = np.empty((self.height, self.width, *array.shape[2:]), array.dtype)
        canvas[...] = fill
        x, y = left - self.x0, top - self.y0
        canvas[y : y + part.shape[0], x : x + part.shape[1]] = part
        return canvas

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        return coords - np.array([self.x0, self.y0])

    def apply_box(self, box: np.ndarray) -> np.ndarray:
        size = np.array([self.width, self.height])
        corners = self.apply_coords(np.asarray(box, dtype=np.float64).reshape(-1, 2, 2))
        centers = corners.mean(axis=1)
        inside = ((centers > 0) & (centers < size)).all(axis=1)
        return (corners.clip(0, size) * inside[:, None, None]).reshape(-1, 4)


class RandomExpand(T.Augmentation):
    """With probability 1/2, put the image at a random place on a larger canvas."""

    def __init__(self, max_ratio: float, fill: Sequence[float]):
        """
        Args:
            max_ratio: the canvas has 1 to ``max_ratio`` times the image's height and width.
            fill: color of the canvas, in the image's channel order.
        """
        super().__init__()
        self._init(locals())

    def get_transform(self, image: np.ndarray) -> T.Transform:
        if self._rand_range() < 0.5:
            return T.NoOpTransform()
        height, width = image.shape[:2]
        ratio = self._rand_range(1, self.max_ratio)
        left = int(self._rand_range(0, width * (ratio - 1)))
        top = int(self._rand_range(0, height * (ratio - 1)))
        return WindowTransform(-left, -top, int(width * ratio), int(height * ratio), self.fill)


class ConstrainedCrop(T.Augmentation):
    """No crop, or a crop with 0.3 to 1 times the sides that contains the center of an object.

    SSD also requires a minimum IoU with an object, drawn from five values. In YOLACT's code that
    test can never fail, and its author measured a lower AP after fixing it. All that remains of it
    is that one image in six is not cropped. (torchvision's ``RandomIoUCrop`` does not reveal its
    window in most versions.)
    """

    KEEP = 1 / 6
    TRIES = 50

    def get_transform(self, image: np.ndarray, boxes: np.ndarray) -> T.Transform:
        """
        Args:
            image: (H, W, C).
            boxes: (N, 4) x1, y1, x2, y2 of the objects in pixels, without crowds.
        """
        if len(boxes) == 0:
            return T.NoOpTransform()  # no crop can contain an object
        height, width = image.shape[:2]
        centers = (boxes[:, :2] + boxes[:, 2:]) / 2
        while self._rand_range() >= self.KEEP:
            for _ in range(self.TRIES):
                w, h = self._rand_range(0.3, 1) * width, self._rand_range(0.3, 1) * height
                left, top = self._rand_range(0, width - w), self._rand_range(0, height - h)
                low, high = np.floor([left, top]), np.floor([left + w, top + h])
                has_center = ((low < centers) & (centers < high)).all(axis=1).any()
                if has_center and 0.5 <= h / w <= 2:
                    return WindowTransform(*low.astype(int), *(high - low).astype(int))
        return T.NoOpTransform()
