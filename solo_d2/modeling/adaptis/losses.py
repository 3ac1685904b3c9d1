"""Normalized focal losses (AdaptIS, section 3.3) and the loss of the proposal head.

The modulating weights of a sample are rescaled to sum to its number of pixels, so that the loss
does not fade as the network improves. The factor is a constant for the gradient. Everything is
evaluated in float32: 1e-12 is nothing in half precision.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORE = -1


def normalized_focal_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    alpha: float = 0.5,
    gamma: float = 2.0,
    num_pixels: Tensor | None = None,
) -> Tensor:
    """Of masks: sigmoid.

    Args:
        logits: (n, 1, h, w).
        labels: (n, 1, h, w): 1 object, 0 rest, -1 ignored.
        alpha: weight of the object's pixels; the others have 1 - alpha.
        gamma: how little well-classified pixels count.
        num_pixels: (n,) to which the modulating weights are rescaled; default h * w, ignored
            pixels included. For a sample in a padded batch: its own.

    Returns:
        (n,): the mean over the pixels that are not ignored; 0 if all are.
    """
    logits = logits.flatten(1).float()
    labels = labels.flatten(1)
    counted = labels != IGNORE
    positive = labels > 0
    probs = logits.sigmoid()
    truth = torch.where(positive, probs, 1 - probs).masked_fill(~counted, 1.0)
    beta = (1 - truth) ** gamma
    if num_pixels is None:
        num_pixels = torch.full_like(logits[:, 0], logits.shape[1])
    factor = num_pixels / (beta.detach().sum(dim=1) + 1e-12)
    weight = torch.where(positive, alpha, 1 - alpha) * counted * factor[:, None]
    total = -(weight * beta * (truth + 1e-12).clamp(max=1).log()).sum(dim=1)
    return total / (counted.sum(dim=1) + 1e-12)


def normalized_focal_loss_softmax(logits: Tensor, labels: Tensor, *, gamma: float = 1.0) -> Tensor:
    """Of semantic maps: softmax. Here only the pixels that count make up the normalizer.

    Args:
        logits: (B, K, h, w).
        labels: (B, h, w) int64 in [0, K), -1 ignored.
        gamma: how little well-classified pixels count.

    Returns:
        (B,): the mean over the pixels that are not ignored; 0 if all are.
    """
    counted = labels != IGNORE
    probs = logits.float().softmax(dim=1)
    truth = probs.gather(1, labels.clamp(min=0)[:, None])[:, 0].masked_fill(~counted, 1.0)
    truth, counted = truth.flatten(1), counted.flatten(1)
    beta = (1 - truth) ** gamma
    count = counted.sum(dim=1)
    factor = count / (beta.detach().sum(dim=1) + 1e-10)
    total = -(factor[:, None] * beta * (truth + 1e-10).clamp(max=1).log() * counted).sum(dim=1)
    return total / (count + 1e-10)


def proposal_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy with soft targets, not reduced.

    A target of -1 gives 0; the official code counts it all the same when it takes the mean.

    Args:
        logits, targets: of the same shape; targets in [0, 1] or -1.
    """
    loss = F.binary_cross_entropy_with_logits(
        logits.float(), targets.clamp(min=0).float(), reduction="none"
    )
    return loss * (targets != IGNORE)
