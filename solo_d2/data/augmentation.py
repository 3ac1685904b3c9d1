"""What ``cfg.INPUT`` does to an image and its annotations, before any model sees them.

Detectron2's resize and flip; a resize to a square; and the augmentation of SSD (arXiv 1512.02325)
as YOLACT's published code has it. Random numbers are numpy's global ones, as in Detectron2.
"""

# Detectron2's augmentations use numpy's legacy global state.
# ruff: noqa: NPY002

from collections.abc import Sequence

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from torchvision.ops import box_iou

KINDS = ("default", "ssd")


def build_augmentations(cfg: CfgNode, is_train: bool) -> list[T.Augmentation]:
    """The augmentations of ``cfg.INPUT``, in the order in which they are applied.

    Raises:
        ValueError: a key of INPUT has a value that is not known.
    """
    options = cfg.INPUT
    if options.AUGMENTATION not in KINDS:
        raise ValueError(
            f"INPUT.AUGMENTATION must be one of {', '.join(KINDS)}, not {options.AUGMENTATION!r}"
        )
    resize, *flips = utils.build_augmentation(cfg, is_train)
    if options.SQUARE_SIZE:
        resize = SquareResize(options.SQUARE_SIZE)
    if not is_train:
        return [resize]
    crop = [T.RandomCrop(options.CROP.TYPE, options.CROP.SIZE)] if options.CROP.ENABLED else []
    if options.AUGMENTATION == "default":
        return [*crop, resize, *flips]
    return [*crop, *_build_ssd(cfg), *flips, resize]


def test_resize(cfg: CfgNode) -> T.Augmentation:
    """How an image is resized for inference."""
    return build_augmentations(cfg, is_train=False)[0]


test_resize.__test__ = False  # type: ignore[attr-defined]  # no test, though pytest would think so


def to_network_input(
    image_rgb: np.ndarray, resize: T.Augmentation, image_format: str
) -> torch.Tensor:
    """An image as a model takes it.

    Args:
        image_rgb: (H, W, 3) uint8.
        resize: see ``test_resize``.
        image_format: "RGB" or "BGR", the order of channels that the model takes.

    Returns:
        (3, H', W') float32.
    """
    image = image_rgb if image_format == "RGB" else image_rgb[:, :, ::-1]
    transform = resize.get_transform(image)
    if isinstance(transform, T.ResizeTransform):
        # a very long image would be left with no pixel across
        transform.new_h, transform.new_w = max(1, transform.new_h), max(1, transform.new_w)
    image = transform.apply_image(image)
    return torch.as_tensor(np.ascontiguousarray(image.transpose(2, 0, 1)), dtype=torch.float32)


def _build_ssd(cfg: CfgNode) -> list[T.Augmentation]:
    options, image_format = cfg.INPUT.SSD, cfg.INPUT.FORMAT
    if image_format not in ("RGB", "BGR"):
        raise ValueError(f"INPUT.AUGMENTATION 'ssd' needs RGB or BGR images, not {image_format}")
    augmentations: list[T.Augmentation] = []
    if options.PHOTOMETRIC:
        augmentations.append(PhotometricDistortion(image_format))
    if options.MAX_EXPAND > 1:
        fill = options.FILL if image_format == "RGB" else options.FILL[::-1]
        augmentations.append(RandomExpand(options.MAX_EXPAND, fill))
    if options.CROP:
        augmentations.append(ConstrainedCrop(options.CROP_IOU_TEST))
    return augmentations


class PlainResizeTransform(T.Transform):
    """Bilinear with half-pixel centers and no antialiasing; the aspect ratio may change.

    Detectron2's ``ResizeTransform`` goes through Pillow, which blurs before it shrinks. Images
    become float32 before, so that nothing is rounded; a mask is set where it is one half or more.
    """

    def __init__(self, height: int, width: int, new_height: int, new_width: int):
        super().__init__()
        self._set_attributes(locals())

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        return self._resize(np.ascontiguousarray(img, dtype=np.float32), cv2.INTER_LINEAR)

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        return coords * np.array([self.new_width / self.width, self.new_height / self.height])

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        mask = np.ascontiguousarray(segmentation, dtype=np.uint8)
        # between the labels 1 and 3 is not 2
        is_binary = mask.size == 0 or mask.max() <= 1
        resized = self._resize(mask, cv2.INTER_LINEAR if is_binary else cv2.INTER_NEAREST)
        return resized.astype(segmentation.dtype)

    def _resize(self, array: np.ndarray, interpolation: int) -> np.ndarray:
        resized = cv2.resize(array, (self.new_width, self.new_height), interpolation=interpolation)
        return resized.reshape(*resized.shape[:2], *array.shape[2:])  # one channel stays one


class SquareResize(T.Augmentation):
    """Resize any image to ``size`` x ``size`` pixels; see ``PlainResizeTransform``."""

    def __init__(self, size: int):
        super().__init__()
        self._init(locals())

    def get_transform(self, image: np.ndarray) -> T.Transform:
        height, width = image.shape[:2]
        return PlainResizeTransform(height, width, self.size, self.size)


class PhotometricTransform(T.NoOpTransform):
    """Change brightness, contrast, saturation and hue; coordinates and masks stay.

    The image becomes float32 and may leave the range of 0 to 255, as published.
    """

    def __init__(
        self,
        image_format: str,
        *,
        brightness: float = 0.0,
        contrast: float = 1.0,
        contrast_first: bool = True,
        saturation: float = 1.0,
        hue: float = 0.0,
    ):
        """
        Args:
            image_format: "RGB" or "BGR".
            brightness: is added.
            contrast: factor on all channels.
            contrast_first: before saturation and hue change, or after.
            saturation: factor.
            hue: degrees to turn it by.
        """
        super().__init__()
        self._set_attributes(locals())
        self._to_hsv = getattr(cv2, f"COLOR_{image_format}2HSV")
        self._from_hsv = getattr(cv2, f"COLOR_HSV2{image_format}")

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        img = img.astype(np.float32) + np.float32(self.brightness)
        if self.contrast_first:
            img *= np.float32(self.contrast)
        img = cv2.cvtColor(img, self._to_hsv)  # hue 0 to 360
        img[:, :, 1] *= self.saturation
        img[:, :, 0] = (img[:, :, 0] + self.hue) % 360
        img = cv2.cvtColor(img, self._from_hsv)
        if not self.contrast_first:
            img *= np.float32(self.contrast)
        return img

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        return segmentation


class PhotometricDistortion(T.Augmentation):
    """Each of four changes with probability 1/2, and contrast first or last with the same."""

    def __init__(self, image_format: str):
        super().__init__()
        self._init(locals())

    def get_transform(self, image: np.ndarray) -> T.Transform:
        return PhotometricTransform(
            self.image_format,
            brightness=self._sometimes(-32, 32, otherwise=0),
            contrast=self._sometimes(0.5, 1.5, otherwise=1),
            contrast_first=self._rand_range() < 0.5,
            saturation=self._sometimes(0.5, 1.5, otherwise=1),
            hue=self._sometimes(-18, 18, otherwise=0),
        )

    def _sometimes(self, low: float, high: float, *, otherwise: float) -> float:
        return self._rand_range(low, high) if self._rand_range() < 0.5 else otherwise


class WindowTransform(T.Transform):
    """Look at the image through a window, which may be larger than the image, or lie beside it.

    A box is clipped to the window; one whose center is not inside becomes empty, for its object
    leaves the image. Polygons are clipped too (fvcore's ``CropTransform`` needs shapely for that).
    """

    def __init__(
        self, x0: int, y0: int, width: int, height: int, fill: Sequence[float] = (0, 0, 0)
    ):
        """
        Args:
            x0, y0: where the window's left upper corner is in the image; may be negative.
            width, height: of the window.
            fill: color of what is not image, a number per channel. Masks are not set there.
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

    def apply_polygons(self, polygons: list[np.ndarray]) -> list[np.ndarray]:
        clipped = [self._clip(self.apply_coords(polygon)) for polygon in polygons]
        return [polygon for polygon in clipped if len(polygon) >= 3]

    def _clip(self, polygon: np.ndarray) -> np.ndarray:
        """What is inside of each border in turn (Sutherland and Hodgman)."""
        for axis, border, sign in (
            (0, 0, 1),
            (0, self.width, -1),
            (1, 0, 1),
            (1, self.height, -1),
        ):
            depth = sign * (polygon[:, axis] - border)
            following, depth_there = np.roll(polygon, -1, axis=0), np.roll(depth, -1)
            inside = depth >= 0
            crosses = inside != (depth_there >= 0)
            step = np.divide(depth, depth - depth_there, out=np.zeros_like(depth), where=crosses)
            crossing = polygon + step[:, None] * (following - polygon)
            points = np.stack([polygon, crossing], axis=1)
            polygon = points[np.stack([inside, crosses], axis=1)]
        return polygon


class RandomExpand(T.Augmentation):
    """With probability 1/2, put the image somewhere on a larger canvas."""

    def __init__(self, max_ratio: float, fill: Sequence[float]):
        """
        Args:
            max_ratio: the canvas has 1 to so many times the image's height and width.
            fill: color of the canvas, in the image's order of channels.
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
    """Nothing, or a crop of 0.3 to 1 of the sides that holds the center of an object.

    Its input needs, beside "image", "boxes" (N, 4), x1 y1 x2 y2 in pixels, and "is_crowd" (N,)
    bool; ``InstanceMapper`` gives them.
    """

    # The smallest IoU that some object has to have with the crop; the last asks for none.
    MIN_IOUS = (0.1, 0.3, 0.7, 0.9, 0.0)
    TRIES = 50

    def __init__(self, iou_test: bool = False):
        """
        Args:
            iou_test: honour ``MIN_IOUS``. The published code tests in a way that nothing can fail,
                and its author saw a lower AP with the test in order.
        """
        super().__init__()
        self._init(locals())

    def get_transform(
        self, image: np.ndarray, boxes: np.ndarray, is_crowd: np.ndarray
    ) -> T.Transform:
        height, width = image.shape[:2]
        objects = boxes[~is_crowd]
        if len(objects) == 0:
            return T.NoOpTransform()  # no crop would do
        while True:
            choice = np.random.randint(1 + len(self.MIN_IOUS))
            if choice == 0:
                return T.NoOpTransform()
            windows, fits = self._draw(height, width)
            centers = (objects[:, :2] + objects[:, 2:]) / 2
            low, high = windows[:, None, :2], windows[:, None, 2:]
            fits &= ((low < centers) & (centers < high)).all(axis=2).any(axis=1)
            if self.iou_test:
                ious = box_iou(torch.from_numpy(windows), torch.from_numpy(objects))
                fits &= ious.amax(dim=1).numpy() >= self.MIN_IOUS[choice - 1]
            if fits.any():
                x0, y0, x1, y1 = windows[fits.argmax()].astype(int).tolist()
                return WindowTransform(x0, y0, x1 - x0, y1 - y0)

    def _draw(self, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
        """(TRIES, 4) x1 y1 x2 y2, whole numbers, and whether their aspect ratio is allowed."""
        w = self._rand_range(0.3 * width, width, self.TRIES)
        h = self._rand_range(0.3 * height, height, self.TRIES)
        left = self._rand_range(0, 1, self.TRIES) * (width - w)
        top = self._rand_range(0, 1, self.TRIES) * (height - h)
        windows = np.floor(np.stack([left, top, left + w, top + h], axis=1))
        return windows, (0.5 <= h / w) & (h / w <= 2)
