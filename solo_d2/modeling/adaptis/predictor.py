"""Interactive prediction: any number of points on one image."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from detectron2.structures import Instances
from torch import Tensor

from .embedded import EmbeddedImage
from .finder import ObjectFinder


class AdaptISPredictor:
    """Set an image once, then find the objects under points, any number of times.

    The backbone, the semantic head and everything else that does not depend on points run only in
    ``set_image``.
    """

    def __init__(self, model: ObjectFinder, *, resize: T.Augmentation, input_format: str):
        """
        Args:
            model: in eval mode.
            resize: resizes an image as the model expects it.
            input_format: "RGB" or "BGR", the channel order that the model expects.

        Raises:
            ValueError: the model takes no points, or ``input_format`` has an unsupported value.
        """
        if not isinstance(model, ObjectFinder):
            raise ValueError(f"points need an AdaptIS model, not {type(model).__name__}")
        if input_format not in ("RGB", "BGR"):
            raise ValueError(f"input_format must be one of RGB, BGR, not {input_format!r}")
        self.model = model
        self.resize = resize
        self.input_format = input_format
        self._image: EmbeddedImage | None = None
        self._size = (0, 0)

    @classmethod
    def from_config(cls, cfg: CfgNode, model: ObjectFinder) -> "AdaptISPredictor":
        """Create a predictor that resizes like Detectron2's ``DefaultPredictor``."""
        size = (cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MIN_SIZE_TEST)
        resize = T.ResizeShortestEdge(size, cfg.INPUT.MAX_SIZE_TEST)
        return cls(model, resize=resize, input_format=cfg.INPUT.FORMAT)

    def set_image(self, image_rgb: np.ndarray) -> None:
        """Compute everything that does not depend on points.

        Args:
            image_rgb: (H, W, 3) uint8.
        """
        self._image = None  # if this image is bad, the previous one must not be used instead
        image = image_rgb if self.input_format == "RGB" else image_rgb[:, :, ::-1]
        resized = self.resize.get_transform(image).apply_image(image)
        tensor = torch.as_tensor(resized.astype(np.float32).transpose(2, 0, 1))
        self._image = self.model.embed_image(tensor)
        self._size = (image_rgb.shape[0], image_rgb.shape[1])

    def predict(
        self, points: Any, labels: Sequence[int] | None = None, *, exclude: Any = None
    ) -> Instances:
        """Find the objects under points.

        Args:
            points: (M, 2), x and y in pixels of the image given to ``set_image``; an array, a
                tensor or nested lists.
            labels: None: each point requests an object of its own. Otherwise (M,), 1 for points on
                one object and 0 for points that are not on it; see ``merge_masks``.
            exclude: (H, W) bool, pixels of objects that are already known. Masks do not contain
                these pixels, and a point on them finds nothing.

        Returns:
            On the CPU: an instance for each point, in the order of the points, or a single one with
            ``labels``; see ``AdaptIS.describe``.

        Raises:
            ValueError: no image is set, there is no point, a point is not in the image, a label is
                not 0 or 1, no point has label 1, or ``exclude`` has another size.
        """
        if self._image is None:
            raise ValueError("no image is set; call set_image first")
        positive = None if labels is None else _checked_labels(labels, len(points))
        if exclude is not None:
            exclude = torch.as_tensor(exclude).bool().to(self.model.device)
            if tuple(exclude.shape) != self._size:
                raise ValueError(f"exclude must be {self._size}, not {tuple(exclude.shape)}")
        probs = self._image.prompt(points, *self._size)
        points = torch.as_tensor(points, dtype=torch.float32)
        if exclude is not None:
            columns, rows = points.long().to(exclude.device).unbind(1)
            probs = probs * ~(exclude | exclude[rows, columns][:, None, None])
        if positive is not None:
            threshold = self.model.mask_threshold
            probs = merge_masks(probs, points, positive, mask_threshold=threshold)[None]
        return self.model.describe(self._image, probs).to("cpu")


def _checked_labels(labels: Any, num_points: int) -> Tensor:
    """Labels as (M,) bool."""
    labels = torch.as_tensor(labels)
    if labels.shape != (num_points,):
        raise ValueError(f"labels must be ({num_points},), not {tuple(labels.shape)}")
    if not ((labels == 0) | (labels == 1)).all():
        raise ValueError(f"labels must be 0 or 1, not {labels.tolist()}")
    if not labels.any():
        raise ValueError("labels must contain a 1, for a point on the object")
    return labels.bool()


def merge_masks(
    probs: Tensor, points: Tensor, positive: Tensor, *, mask_threshold: float
) -> Tensor:
    """One object from the masks of several points on it (positive) and off it (negative).

    The decoder accepts a single point, so its masks are combined here:

    1. The object is the union of the positive points' masks: the maximum of their probabilities.
    2. If the mask of a negative point is another object, that is, contains that point and no
       positive one, all of that mask is removed.
    3. For any other negative point (its mask is the same object, or misses the point), the pixels
       that are nearer to it than to every positive point are removed.

    Therefore no negative point is in the result, and a single positive point gives its own mask.

    Args:
        probs: (M, H, W) soft masks of the points.
        points: (M, 2) x and y in pixels.
        positive: (M,) bool; at least one is true.
        mask_threshold: a pixel belongs to a mask where its probability exceeds this.

    Returns:
        (H, W) soft mask.
    """
    if positive.all():  # the usual case; distances would take most of the time
        return probs.amax(dim=0)
    points, positive = points.to(probs.device), positive.to(probs.device)
    columns, rows = points.long().unbind(1)
    # which masks (first axis) contain which points (second axis)
    contains = probs[:, rows, columns] > mask_threshold
    is_other = contains.diagonal() & ~(contains & positive).any(dim=1) & ~positive
    y = torch.arange(probs.shape[1], device=probs.device)[:, None]
    x = torch.arange(probs.shape[2], device=probs.device)
    distance = (x - columns[:, None, None]) ** 2 + (y - rows[:, None, None]) ** 2
    merged = probs[positive].amax(dim=0)
    nearest = distance[positive].amin(dim=0)
    removed = (probs[is_other] > mask_threshold).any(dim=0)
    removed |= (distance[~positive & ~is_other] < nearest).any(dim=0)
    return merged.masked_fill(removed, 0)
