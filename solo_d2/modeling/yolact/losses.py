"""Losses of YOLACT: pure functions of predictions and targets, in float32.

Sums, where the text does not say otherwise; the model divides by the number of positive anchors.
With nothing to sum they are zeros that still are connected to the predictions.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .targets import BACKGROUND


def box_loss(offsets: Tensor, targets: Tensor) -> Tensor:
    """Smooth L1 over the offsets (n, 4) of positive anchors."""
    return F.smooth_l1_loss(offsets, targets, reduction="sum")


def hard_negatives(logits: Tensor, labels: Tensor, ratio: float) -> Tensor:
    """The background anchors of each image that look least like background.

    The n best of all anchors by -log p(background), where positive and ignored ones count as 0
    but still take places, n being ``ratio`` times the positive ones of the image.

    Args:
        logits: (N, P, C + 1), background first.
        labels: (N, P) as in ``targets.Matches``.
        ratio: negatives per positive.

    Returns:
        (N, P) bool.
    """
    with torch.no_grad():
        difficulty = logits.logsumexp(dim=2) - logits[:, :, BACKGROUND]
        difficulty[labels != BACKGROUND] = 0
        order = difficulty.argsort(dim=1, descending=True)
        count = (ratio * (labels > BACKGROUND).sum(dim=1)).clamp(max=labels.shape[1] - 1)
        place = torch.arange(labels.shape[1], device=labels.device)
        hard = torch.zeros_like(labels, dtype=torch.bool)
        hard.scatter_(1, order, place < count[:, None])
        return hard & (labels == BACKGROUND)


def class_loss(logits: Tensor, labels: Tensor, ratio: float) -> Tensor:
    """Cross entropy over positive anchors and hard negatives; args as of ``hard_negatives``."""
    chosen = (labels > BACKGROUND) | hard_negatives(logits, labels, ratio)
    return F.cross_entropy(logits[chosen], labels[chosen], reduction="sum")


def mask_loss(masks: Tensor, targets: Tensor, areas: Tensor | float) -> Tensor:
    """Binary cross entropy of soft masks, over all pixels of each, divided by an area of each.

    A pixel of the target that was cropped away costs 100 and has no gradient, as published.

    Args:
        masks: (n, h, w) in 0 to 1.
        targets: (n, h, w) bool.
        areas: (n,) in pixels, or one for all.
    """
    loss = F.binary_cross_entropy(masks, targets.float(), reduction="none")
    return (loss.sum(dim=(1, 2)) / areas).sum()


def semantic_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Binary cross entropy, both (C, h, w): the sum over classes of means over pixels."""
    loss = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return loss.mean(dim=(1, 2)).sum()


def mask_ious(masks: Tensor, targets: Tensor) -> Tensor:
    """(n,) IoU of soft masks (n, h, w), where they are above one half, with bool ones."""
    binary = masks > 0.5
    shared = (binary & targets).sum(dim=(1, 2))
    either = (binary | targets).sum(dim=(1, 2))
    return shared / either.clamp(min=1)


def mask_iou_loss(predicted: Tensor, ious: Tensor) -> Tensor:
    """Smooth L1 between predicted and true IoUs (n,)."""
    return F.smooth_l1_loss(predicted, ious, reduction="sum")
