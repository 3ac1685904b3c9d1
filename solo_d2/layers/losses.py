"""Losses that no library of ours has."""

from torch import Tensor

# Keeps the quotient finite when prediction and target are both empty; one for each square sum, as
# in the published code.
_DICE_EPS = 1e-3


def dice_loss(probs: Tensor, targets: Tensor) -> Tensor:
    """Dice distance of soft masks, with squared terms in the denominator (SOLO, section 3.3.2).

    The sums are taken in float32, whatever the input: they exceed the range of float16.

    Args:
        probs: (N, H, W) soft masks in [0, 1].
        targets: (N, H, W) of the same shape, bool or in {0, 1}.

    Returns:
        (N,) distances in [0, 1], float32. Not reduced, so N = 0 is ordinary.
    """
    p = probs.flatten(1).float()
    t = targets.flatten(1).to(p.dtype)
    intersection = (p * t).sum(dim=1)
    squares = (p * p).sum(dim=1) + _DICE_EPS + t.sum(dim=1) + _DICE_EPS
    return 1 - 2 * intersection / squares
