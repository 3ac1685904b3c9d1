"""What EPS trains on: image labels and saliency, derived from annotations where missing."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.structures import BitMasks, PolygonMasks
from torch import Tensor
from torch.nn import functional as F

from ..options import check_at_least

# In label maps: 0 is the background, k + 1 the class k, and this is not labeled.
UNLABELED = 255


def image_labels(inputs: dict[str, Any], num_classes: int) -> Tensor | None:
    """(C,) float32, 1 for each class in the image; None if the input has no annotations.

    Args:
        inputs: one input of a model, with "image_labels" in that form, or with "instances", or with
            "sem_seg" (H, W), a label map.
        num_classes: C.

    Raises:
        ValueError: the labels have another shape, or a class is out of range.
    """
    name = inputs.get("file_name", "?")
    if "image_labels" in inputs:
        labels = torch.as_tensor(inputs["image_labels"], dtype=torch.float32)
        if labels.shape != (num_classes,):
            raise ValueError(
                f"image {name}: image_labels has the shape {tuple(labels.shape)}, but must have a "
                f"number for each of the {num_classes} classes"
            )
        return labels
    if "instances" in inputs:
        classes = inputs["instances"].gt_classes.tolist()
    elif "sem_seg" in inputs:
        classes = label_map_classes(inputs["sem_seg"])
    else:
        return None
    return multi_hot(classes, num_classes, name)


def label_map_classes(label_map: Tensor) -> list[int]:
    """The classes in a label map."""
    return [x - 1 for x in label_map.unique().tolist() if x not in (0, UNLABELED)]


def multi_hot(classes: Sequence[int], num_classes: int, name: str) -> Tensor:
    """(C,) float32, 1 for each class in ``classes``.

    Args:
        classes: indices.
        num_classes: C.
        name: of the image, for the error.

    Raises:
        ValueError: a class is out of range.
    """
    labels = torch.zeros(num_classes)
    for k in set(classes):
        if not 0 <= k < num_classes:
            raise ValueError(
                f"image {name} has an object of class {k}, but gt_classes must be in "
                f"[0, {num_classes}) (num_classes)"
            )
        labels[k] = 1
    return labels


@dataclass(frozen=True)
class StandIn:
    """The union of all ground-truth masks of an image, in place of its saliency map.

    Attributes:
        erosion: radius in pixels.
        blur: standard deviation of a Gaussian in pixels, applied after the erosion.
    """

    erosion: int = 0
    blur: float = 0.0

    def __post_init__(self) -> None:
        """
        Raises:
            ValueError: an attribute has an unsupported value.
        """
        check_at_least(0, erosion=self.erosion, blur=self.blur)

    def __call__(self, inputs: dict[str, Any]) -> Tensor:
        """(1, H, W) float32, 0 to 1, of an input with "sem_seg", a label map, or "instances".

        Raises:
            ValueError: it has neither, or instances without masks.
        """
        mask = _foreground(inputs, inputs["image"].shape[-2:]).float()[None, None]
        if self.erosion:
            side = 2 * self.erosion + 1
            mask = 1 - F.max_pool2d(1 - mask, side, stride=1, padding=self.erosion)
        return (_gaussian_blur(mask, self.blur) if self.blur else mask)[0]


def _foreground(inputs: dict[str, Any], size: tuple[int, int]) -> Tensor:
    """(H, W) bool"""
    name = inputs.get("file_name", "?")
    if "sem_seg" in inputs:
        return inputs["sem_seg"] != 0
    if "instances" not in inputs:
        raise ValueError(
            f"image {name} has neither 'saliency' nor masks for a stand-in ('instances', "
            "'sem_seg'); see MODEL.EPS.SALIENCY_FOLDER"
        )
    instances = inputs["instances"]
    if instances.has("gt_masks"):
        masks = instances.gt_masks
        if isinstance(masks, PolygonMasks):
            masks = BitMasks.from_polygon_masks(masks, *size)
        return masks.tensor.any(dim=0)
    if len(instances.gt_classes):
        raise ValueError(
            f"image {name} has instances without masks; set MODEL.MASK_ON: True so that they are "
            "loaded, or MODEL.EPS.SALIENCY_FOLDER"
        )
    return torch.zeros(size, dtype=torch.bool)


def _gaussian_blur(x: Tensor, sigma: float) -> Tensor:
    """(1, 1, H, W) -> the same shape. Unlike torchvision's, it accepts images of any size."""
    radius = math.ceil(3 * sigma)
    distance = torch.arange(-radius, radius + 1, device=x.device)
    kernel = torch.exp(-(distance**2) / (2 * sigma**2))
    kernel = kernel / kernel.sum()
    across = F.conv2d(F.pad(x, (radius, radius, 0, 0), "replicate"), kernel.view(1, 1, 1, -1))
    return F.conv2d(F.pad(across, (0, 0, radius, radius), "replicate"), kernel.view(1, 1, -1, 1))
