"""Non-maximum suppression on grids and on masks."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .masks import chunk_length
from .symbolic import is_exporting

_DECAYS = {
    "gaussian": lambda iou, sigma: torch.exp(-sigma * iou**2),
    "linear": lambda iou, sigma: 1 - iou,
}
MATRIX_NMS_KERNELS = tuple(_DECAYS)


def point_nms(scores: Tensor) -> Tensor:
    """Zero every score that is below its upper, left or upper-left neighbor of the same class.

    The window is 2x2 and looks back only, as in the published code; a symmetric 3x3 window would
    keep different cells. Equal neighbors all survive.

    Args:
        scores: (N, C, S, S), non-negative.

    Returns:
        (N, C, S, S), a new tensor.
    """
    peak = F.max_pool2d(scores, kernel_size=2, stride=1, padding=1)[:, :, :-1, :-1]
    return scores * (peak == scores)


def pairwise_mask_iou(masks: Tensor) -> Tensor:
    """IoU of every pair of binary masks; 0 for two empty masks.

    Args:
        masks: (N, H, W) bool.

    Returns:
        (N, N) float32.
    """
    flat = masks.flatten(1)
    length = chunk_length(len(masks), masks.device)
    intersection = torch.zeros((), device=masks.device)
    with torch.autocast(masks.device.type, enabled=False):
        for pixels in [flat] if is_exporting() else flat.split(length, dim=1):
            # float32 counts pixels exactly up to 2 ** 24, float16 only up to 2 ** 11
            pixels = pixels.float()
            intersection = intersection + pixels @ pixels.T
    areas = intersection.diagonal()
    union = areas[:, None] + areas[None, :] - intersection
    return intersection / union.clamp(min=1)


def _same_class_iou_above_diagonal(masks: Tensor, labels: Tensor) -> Tensor:
    """(N, N) IoU of mask i with a later mask j of its class, 0 elsewhere."""
    same = labels[:, None] == labels[None, :]
    return (pairwise_mask_iou(masks) * same).triu(diagonal=1)


def matrix_nms(
    masks: Tensor,
    labels: Tensor,
    scores: Tensor,
    *,
    kernel: str = "gaussian",
    sigma: float = 2.0,
    finite: bool = False,
) -> Tensor:
    """Matrix NMS: decay every score by its overlaps, in one pass (SOLOv2, section 3.3).

    With i < j in score order, ``decay_j = min_i f(iou_ij) / f(max_k<i iou_ki)``. ``sigma``
    multiplies: ``f(iou) = exp(-sigma * iou ** 2)``; the paper's formula divides, so its 0.5 is 2
    here. The linear kernel ``1 - iou`` gives NaN for the third of three identical masks, as in the
    original; a ``score >= threshold`` test then drops it.

    Args:
        masks: (N, H, W) bool, by descending score.
        labels: (N,) classes; masks of different classes do not affect each other.
        scores: (N,) descending.
        kernel: "gaussian" or "linear".
        sigma: factor of the gaussian kernel.
        finite: keep the linear kernel's divisor above 0, so that duplicates get 0 instead of NaN.

    Returns:
        (N,) decayed scores, in the given order.

    Raises:
        ValueError: ``kernel`` has an unsupported value.
    """
    if kernel not in _DECAYS:
        raise ValueError(f"kernel must be one of {MATRIX_NMS_KERNELS}, not {kernel!r}")
    if len(scores) == 0:
        return scores
    decay = _DECAYS[kernel]
    iou = _same_class_iou_above_diagonal(masks, labels)
    # largest IoU of mask i with a better one
    compensation = iou.amax(dim=0)
    if finite:
        compensation = compensation.clamp(max=1 - 1e-6)
    ratio = decay(iou, sigma) / decay(compensation, sigma)[:, None]
    return scores * ratio.amin(dim=0)


def mask_nms(masks: Tensor, labels: Tensor, *, iou_threshold: float = 0.5) -> Tensor:
    """Greedy NMS per class on mask IoU.

    Args:
        masks: (N, H, W) bool, by descending score.
        labels: (N,) classes.
        iou_threshold: a mask is dropped if its IoU with a kept, better one exceeds this.

    Returns:
        (N,) bool, True for the masks to keep. Empty masks that follow another empty mask of their
        class are dropped (their union is empty).
    """
    overlaps = _same_class_iou_above_diagonal(masks, labels) > iou_threshold
    empty = ~masks.flatten(1).any(dim=1)
    both_empty = (empty[:, None] & empty[None, :]).triu(diagonal=1)
    overlaps |= both_empty & (labels[:, None] == labels[None, :])
    # The greedy result is the fixed point of "kept unless a kept, better mask overlaps": after k
    # rounds the first k entries are final, and in practice two or three rounds settle all.
    keep = torch.ones_like(empty)
    while True:
        updated = ~(overlaps & keep[:, None]).any(dim=0)
        if torch.equal(updated, keep):
            return keep
        keep = updated
