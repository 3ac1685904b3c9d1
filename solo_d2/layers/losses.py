"""Losses of soft masks; each returns one number per mask.

The cross-entropies of torch and fvcore take only logits, or do not work under autocast; a mask of
Decoupled SOLO is a product of two probabilities, without a logit.
"""

import torch
from torch import Tensor

# Keeps the quotient finite when prediction and target are both empty; added to each of the two sums
# of squares, as in the published code.
_DICE_EPS = 1e-3


def dice_loss(probs: Tensor, targets: Tensor) -> Tensor:
    """Dice distance of soft masks, with squared terms in the denominator (SOLO, section 3.3.2).

    The sums are always computed in float32, because they exceed the range of float16.

    Args:
        probs: (N, H, W) soft masks in [0, 1].
        targets: (N, H, W), bool or in {0, 1}.

    Returns:
        (N,) distances in [0, 1], float32. Not reduced, so N = 0 needs no special case.
    """
    p = probs.flatten(1).float()
    t = targets.flatten(1).to(p.dtype)
    intersection = (p * t).sum(dim=1)
    squares = (p * p).sum(dim=1) + _DICE_EPS + t.sum(dim=1) + _DICE_EPS
    return 1 - 2 * intersection / squares


def mask_bce_loss(probs: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy of soft masks, mean over the pixels of each (an ablation of SOLO).

    Arguments and result as in ``dice_loss``. The loss of a pixel is at most 16.
    """
    return -_probability_of_truth(probs, targets).log().mean(dim=1)


def mask_focal_loss(
    probs: Tensor, targets: Tensor, *, alpha: float = 0.25, gamma: float = 2.0
) -> Tensor:
    """Focal loss of soft masks, mean over the pixels of each (an ablation of SOLO).

    Arguments and result as in ``dice_loss``.

    Args:
        alpha: weight of the pixels inside; those outside have 1 - alpha.
        gamma: focusing parameter; higher values reduce the weight of well-classified pixels.
    """
    p = _probability_of_truth(probs, targets)
    weight = alpha + (1 - 2 * alpha) * (~targets.flatten(1).bool()).to(p.dtype)
    return -(weight * (1 - p) ** gamma * p.log()).mean(dim=1)


def _probability_of_truth(probs: Tensor, targets: Tensor) -> Tensor:
    """(N, pixels) float32: the predicted probability of each pixel's true label, never 0."""
    p = probs.flatten(1).float()
    return torch.where(targets.flatten(1).bool(), p, 1 - p).clamp(min=torch.finfo(p.dtype).eps)


MASK_LOSSES = {"dice": dice_loss, "focal": mask_focal_loss, "bce": mask_bce_loss}
