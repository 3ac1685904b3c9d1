"""From the raw outputs for one image to detections, and their boxes in the output frame."""

from typing import NamedTuple

import torch
from torch import Tensor

from solo_d2.layers.box_nms import cross_class_fast_nms, fast_nms, traditional_nms

from .anchors import decode

NMS_TYPES = ("fast", "cross_class", "traditional")
BOX_ROUNDINGS = ("int", "float")


class Detections(NamedTuple):
    """D detections of one image, by descending scores."""

    boxes: Tensor  # (D, 4) x1, y1, x2, y2, relative, not clipped
    scores: Tensor  # (D,)
    classes: Tensor  # (D,) int64, without background
    priors: Tensor  # (D,) int64, which anchor


class Candidates(NamedTuple):
    """Anchors that look like an object of some class."""

    boxes: Tensor  # (n, 4) as above
    scores: Tensor  # (C, n) probabilities of all classes
    priors: Tensor  # (n,) int64, ascending


def find_candidates(
    offsets: Tensor, logits: Tensor, priors: Tensor, *, score_threshold: float
) -> Candidates:
    """Anchors of one image whose best class is more probable than ``score_threshold``.

    Args:
        offsets: (P, 4).
        logits: (P, C + 1), background first.
        priors: (P, 4).
        score_threshold: see above.
    """
    scores = logits.softmax(dim=1)[:, 1:]
    # false for NaN
    index = (scores.amax(dim=1) > score_threshold).nonzero()[:, 0]
    boxes = decode(offsets[index], priors[index])
    finite = boxes.isfinite().all(dim=1)
    index = index[finite]
    return Candidates(boxes[finite], scores[index].T, index)


def suppress(
    found: Candidates,
    *,
    unit: float,
    nms_type: str = "fast",
    iou_threshold: float = 0.5,
    top_k: int = 200,
    score_threshold: float = 0.05,
    class_score_threshold: float = 0.0,
    limit_cross_class: bool = False,
    max_detections: int = 100,
) -> Detections:
    """Non-maximum suppression; see ``layers.box_nms``.

    Args:
        found: the candidates.
        unit: pixels that a relative box is in units of.
        nms_type: one of NMS_TYPES.
        iou_threshold, top_k: of the NMS.
        score_threshold: of a class in the traditional NMS.
        class_score_threshold: the same in Fast NMS of each class; 0 for none.
        limit_cross_class: hold cross-class Fast NMS to ``max_detections`` too.
        max_detections: of all classes together.
    """
    boxes, scores, priors = found
    if nms_type == "fast":
        kept = fast_nms(
            boxes,
            scores,
            iou_threshold=iou_threshold,
            top_k=top_k,
            score_threshold=class_score_threshold,
            max_detections=max_detections,
        )
    elif nms_type == "cross_class":
        kept = cross_class_fast_nms(
            boxes,
            scores,
            iou_threshold=iou_threshold,
            top_k=top_k,
            max_detections=max_detections if limit_cross_class else None,
        )
    else:
        kept = traditional_nms(
            boxes * unit,
            scores,
            iou_threshold=iou_threshold,
            score_threshold=score_threshold,
            max_detections=max_detections,
        )
    return Detections(boxes[kept.index], kept.scores, kept.classes, priors[kept.index])


def output_boxes(
    boxes: Tensor, image_size: tuple[int, int], output_size: tuple[int, int], *, rounding: str
) -> Tensor:
    """Boxes in the output frame, as published.

    Each side is clipped at one end only, so that a box beside the image has its ends in the wrong
    order.

    Args:
        boxes: (n, 4) in pixels of the network's input; ends in any order.
        image_size: height and width of the input without padding.
        output_size: the same of the output.
        rounding: "int" drops fractions, "float" keeps them.

    Returns:
        (n, 4) float32 in pixels of the output.
    """
    x = boxes[:, 0::2] / image_size[1] * output_size[1]
    y = boxes[:, 1::2] / image_size[0] * output_size[0]
    x1, y1 = x.amin(dim=1).clamp(min=0), y.amin(dim=1).clamp(min=0)
    x2, y2 = x.amax(dim=1).clamp(max=output_size[1]), y.amax(dim=1).clamp(max=output_size[0])
    result = torch.stack([x1, y1, x2, y2], dim=1)
    return result.trunc() if rounding == "int" else result


def pixel_windows(boxes: Tensor) -> Tensor:
    """(n, 4) boxes -> int64 x1, y1, x2, y2 of the pixels whose middles lie inside."""
    return (boxes - 0.5).ceil().long()
