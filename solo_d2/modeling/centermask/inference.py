"""From the outputs of the FCOS head to boxes."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from detectron2.layers import batched_nms
from torch import Tensor

from .head import FCOSOutputs
from .targets import distances_to_boxes


class SelectedBoxes(NamedTuple):
    """Boxes of one image."""

    boxes: Tensor  # (n, 4) x1, y1, x2, y2 in input pixels, float32; may leave the image
    scores: Tensor  # (n,) sqrt(class probability * centerness), descending
    classes: Tensor  # (n,) int64
    locations: Tensor  # (n, 2) x, y of the locations that predicted them


def select_boxes(
    outputs: FCOSOutputs,
    *,
    strides: Sequence[int],
    score_threshold: float,
    threshold_with_centerness: bool = False,
    pre_nms_topk: int = 1000,
    nms_threshold: float = 0.6,
    post_nms_topk: int = 100,
) -> list[SelectedBoxes]:
    """Boxes of each image. A location can give several boxes, one per class.

    Boxes are not clipped to the image and not filtered by size.

    Args:
        outputs: outputs of ``FCOSHead``.
        strides: strides of the levels.
        score_threshold: minimum class probability.
        threshold_with_centerness: apply it to class probability times centerness instead.
        pre_nms_topk: maximum number of candidates per level that enter NMS.
        nms_threshold: IoU of two boxes of a class above which the worse is dropped; 0: no NMS.
        post_nms_topk: maximum number of boxes per image, exceeded if the last ones have equal
            scores; 0: all.
    """
    levels = [
        _best_of_level(
            *level,
            stride=stride,
            score_threshold=score_threshold,
            threshold_with_centerness=threshold_with_centerness,
            topk=pre_nms_topk,
        )
        for *level, stride in zip(*outputs, strides)
    ]
    return [
        _suppress_boxes(SelectedBoxes(*map(torch.cat, zip(*image))), nms_threshold, post_nms_topk)
        for image in zip(*levels)
    ]


def _best_of_level(
    class_logits: Tensor,
    distances: Tensor,
    centerness: Tensor,
    *,
    stride: int,
    score_threshold: float,
    threshold_with_centerness: bool,
    topk: int,
) -> list[SelectedBoxes]:
    """The best pairs of location and class of one level, per image, unordered."""
    num_classes, width = class_logits.shape[1], class_logits.shape[3]
    # Nothing more is computed for the other pairs, which are nearly all. Centerness is at most 1,
    # so a product above the threshold needs a class probability above it.
    above = (class_logits > logit(score_threshold)).permute(0, 2, 3, 1).flatten(1)
    candidates = []
    for i, pairs_above in enumerate(above):
        pair = pairs_above.nonzero()[:, 0]
        location, label = pair.div(num_classes, rounding_mode="floor"), pair % num_classes
        class_probability = class_logits[i].flatten(1)[label, location].float().sigmoid()
        product = class_probability * centerness[i].flatten()[location].float().sigmoid()
        if threshold_with_centerness:
            keep = product > score_threshold
            location, label, product = location[keep], label[keep], product[keep]
        if len(product) > topk:
            product, best = product.topk(topk)
            location, label = location[best], label[best]
        boxes, points = boxes_at(location, distances[i], width=width, stride=stride)
        candidates.append(SelectedBoxes(boxes, product.sqrt(), label, points))
    return candidates


def boxes_at(
    location: Tensor, distances: Tensor, *, width: int, stride: int
) -> tuple[Tensor, Tensor]:
    """Boxes and their points (x, y) in input pixels.

    Args:
        location: (n,) row-major indices in a level.
        distances: (4, H, W) of the level, see ``FCOSOutputs``.
        width: W.
        stride: of the level.

    Returns:
        (n, 4) and (n, 2), float32.
    """
    row = location.div(width, rounding_mode="floor")
    points = (torch.stack([location - row * width, row], dim=1) * stride + stride // 2).float()
    pixels = distances.flatten(1)[:, location].T.float() * stride
    return distances_to_boxes(points, pixels), points


def _suppress_boxes(found: SelectedBoxes, nms_threshold: float, topk: int) -> SelectedBoxes:
    """NMS within each class, then the best boxes of all classes."""
    if nms_threshold > 0:
        keep = batched_nms(found.boxes, found.scores, found.classes, nms_threshold)
    else:
        keep = found.scores.argsort(descending=True, stable=True)
    if len(keep) > topk > 0:
        scores = found.scores[keep]
        keep = keep[scores >= scores[topk - 1]]
    return SelectedBoxes(*(field[keep] for field in found))


def logit(probability: float) -> float:
    if not 0 < probability < 1:
        return -math.inf if probability <= 0 else math.inf
    return math.log(probability / (1 - probability))
