"""Losses of FCOS's boxes, computed from the distances of a location to the sides of a box."""

import torch
from torch import Tensor

BOX_LOSSES = ("giou", "iou", "linear_iou")


def box_loss(distances: Tensor, targets: Tensor, kind: str) -> Tensor:
    """
    Args:
        distances, targets: (P, 4) to left, top, right and bottom, in strides, not negative.
        kind: "giou" (1 - generalized IoU, arXiv 1902.09630), "iou" (minus the logarithm of the
            IoU) or "linear_iou" (1 - IoU).

    Returns:
        (P,).
    """
    shared = _area(torch.minimum(distances, targets))
    union = _area(distances) + _area(targets) - shared
    # 1 is added to both areas as in the published code, which keeps the IoU above 0
    iou = (shared + 1) / (union + 1)
    if kind == "iou":
        return -iou.log()
    if kind == "linear_iou":
        return 1 - iou
    enclosing = _area(torch.maximum(distances, targets))
    return 1 - iou + (enclosing - union) / enclosing


def _area(distances: Tensor) -> Tensor:
    left, top, right, bottom = distances.unbind(dim=1)
    return (left + right) * (top + bottom)
