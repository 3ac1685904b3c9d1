"""Fast NMS and greedy NMS of boxes that have a score for each class.

Each function takes N candidates and returns the detections by descending score. A candidate may be
detected under several classes.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.ops import nms

from .boxes import box_ious
from .masks import chunk_length


class Kept(NamedTuple):
    """Detections, best first."""

    index: Tensor  # (D,) int64 index of the candidate
    classes: Tensor  # (D,) int64
    scores: Tensor  # (D,)


def fast_nms(
    boxes: Tensor,
    scores: Tensor,
    *,
    iou_threshold: float = 0.5,
    top_k: int = 200,
    score_threshold: float = 0.0,
    max_detections: int | None = 100,
) -> Kept:
    """Fast NMS within each class (YOLACT, section 3.3).

    A candidate is dropped if its IoU with a better one of the class exceeds ``iou_threshold``, even
    if that one is dropped too. Of several boxes without area, only the best is kept.

    Args:
        boxes: (N, 4) x1, y1, x2, y2 in any unit.
        scores: (C, N) scores per class, without background.
        iou_threshold: see above.
        top_k: number of candidates of each class that take part.
        score_threshold: a candidate counts for a class only if its score is higher.
        max_detections: limit for all classes together; None: no limit.
    """
    top_k = min(top_k, len(boxes))
    top, index = scores.topk(top_k, dim=1)
    keep = not_overlapped(boxes, index, iou_threshold)
    if score_threshold > 0:
        keep &= top > score_threshold
    classes, rank = keep.nonzero(as_tuple=True)
    return _best(Kept(index[classes, rank], classes, top[classes, rank]), max_detections)


def cross_class_fast_nms(
    boxes: Tensor,
    scores: Tensor,
    *,
    iou_threshold: float = 0.5,
    top_k: int = 200,
    max_detections: int | None = None,
) -> Kept:
    """Fast NMS across all classes, each candidate under its best class.

    Arguments as in ``fast_nms``, but ``top_k`` limits all candidates together; the published code
    has no other limit.
    """
    best, classes = scores.max(dim=0)
    top, index = best.topk(min(top_k, len(boxes)))
    keep = not_overlapped(boxes, index[None], iou_threshold)[0]
    index = index[keep]
    return _best(Kept(index, classes[index], top[keep]), max_detections)


def traditional_nms(
    boxes: Tensor,
    scores: Tensor,
    *,
    iou_threshold: float = 0.5,
    score_threshold: float = 0.05,
    max_detections: int | None = 100,
) -> Kept:
    """Greedy NMS within each class, as in YOLACT's published code.

    A candidate is dropped if its IoU with a kept, better one of the class is ``iou_threshold`` or
    more, where a box from pixel a to pixel b is b - a + 1 wide.

    Args:
        boxes: (N, 4) x1, y1, x2, y2 in pixels.
        scores: (C, N) scores per class, without background.
        iou_threshold: see above.
        score_threshold: a candidate counts for a class only if its score is higher.
        max_detections: limit for all classes together; None: no limit.
    """
    pixels = boxes + boxes.new_tensor([0.0, 0.0, 1.0, 1.0])
    # torchvision drops only boxes above its threshold, so pass the next smaller number
    below = float(torch.tensor(iou_threshold).nextafter(torch.tensor(0.0)))
    counts = scores > score_threshold
    index, classes = [boxes.new_zeros(0, dtype=torch.long)], [boxes.new_zeros(0, dtype=torch.long)]
    # Class by class: batched_nms moves the boxes of different classes apart, which rounds them.
    for label in counts.any(dim=1).nonzero()[:, 0].tolist():
        candidates = counts[label].nonzero()[:, 0]
        kept = candidates[nms(pixels[candidates], scores[label, candidates], below)]
        index.append(kept)
        classes.append(torch.full_like(kept, label))
    index_of, class_of = torch.cat(index), torch.cat(classes)
    return _best(Kept(index_of, class_of, scores[class_of, index_of]), max_detections)


def not_overlapped(boxes: Tensor, index: Tensor, iou_threshold: float) -> Tensor:
    """(G, K) bool: no box of an earlier rank in the same group overlaps this one.

    Args:
        boxes: (N, 4).
        index: (G, K) groups of boxes, each by descending score.
        iou_threshold: boxes with a higher IoU overlap.
    """
    if index.numel() == 0:
        return torch.zeros_like(index, dtype=torch.bool)
    keep = []
    for group in index.split(chunk_length(index.shape[1] ** 2, boxes.device)):
        ranked = boxes[group]
        overlap = box_ious(ranked, ranked).triu_(diagonal=1).amax(dim=1)
        keep.append(overlap <= iou_threshold)  # false for NaN
    return torch.cat(keep)


def _best(found: Kept, limit: int | None) -> Kept:
    """The best ``limit`` by score; equal scores keep their order."""
    order = found.scores.sort(descending=True, stable=True).indices[:limit]
    return Kept(*(field[order] for field in found))
