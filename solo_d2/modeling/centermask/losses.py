"""Losses of FCOS's boxes, computed from the distances of a location to the sides of a box."""

import torch
from torch import Tensor


def _intersection_and_union(distances: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    shared = _area(torch.minimum(distances, targets))
    return shared, _area(distances) + _area(targets) - shared


def _iou(distances: Tensor, targets: Tensor) -> Tensor:
    """IoU, with 1 added to both areas as in the published code, which keeps it above 0."""
    shared, union = _intersection_and_union(distances, targets)
    return (shared + 1) / (union + 1)


def iou_loss(distances: Tensor, targets: Tensor) -> Tensor:
    """Minus the logarithm of the IoU.

    Args:
        distances, targets: (P, 4) to left, top, right and bottom, in strides, not negative.

    Returns:
        (P,).
    """
    return -_iou(distances, targets).log()


def linear_iou_loss(distances: Tensor, targets: Tensor) -> Tensor:
    """1 - IoU. Args and result as in ``iou_loss``."""
    return 1 - _iou(distances, targets)


def giou_loss(distances: Tensor, targets: Tensor) -> Tensor:
    """1 - generalized IoU (arXiv 1902.09630). Args and result as in ``iou_loss``."""
    _, union = _intersection_and_union(distances, targets)
    enclosing = _area(torch.maximum(distances, targets))
    return 1 - _iou(distances, targets) + (enclosing - union) / enclosing


def _area(distances: Tensor) -> Tensor:
    left, top, right, bottom = distances.unbind(dim=1)
    return (left + right) * (top + bottom)


BOX_LOSSES = {"giou": giou_loss, "iou": iou_loss, "linear_iou": linear_iou_loss}
