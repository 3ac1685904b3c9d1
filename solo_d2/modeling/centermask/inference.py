"""From the outputs of the FCOS head to boxes."""

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from detectron2.layers import batched_nms
from torch import Tensor

from solo_d2.layers.upload import upload

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
    # Nothing more is computed for the other pairs, which are nearly all. Centerness is at most 1,
    # so a product above the threshold needs a class probability above it.
    above = [
        (x > logit(score_threshold)).permute(0, 2, 3, 1).flatten(1) for x in outputs.class_logits
    ]
    image, pair = torch.cat(above, dim=1).nonzero(as_tuple=True)
    starts = [0, *accumulate(x.shape[1] for x in above)]
    num_pairs, num_images = starts.pop(), len(above[0])
    # where each level of each image begins among all pairs, and among those above the threshold
    first = [i * num_pairs + start for i in range(num_images) for start in starts]
    first = upload(torch.tensor(first), pair.device)
    # beside ``nonzero``, the only wait for the device
    bounds = [*torch.searchsorted(image * num_pairs + pair, first).tolist(), len(pair)]
    parts = iter(pair.split([end - begin for begin, end in pairwise(bounds)]))
    results = []
    for i in range(num_images):
        levels = [
            _best_of_level(
                next(parts) - start,
                *(maps[level][i] for maps in outputs),
                stride=strides[level],
                threshold=score_threshold if threshold_with_centerness else None,
                topk=pre_nms_topk,
            )
            for level, start in enumerate(starts)
        ]
        found = SelectedBoxes(*map(torch.cat, zip(*levels)))
        results.append(_suppress_boxes(found, nms_threshold, post_nms_topk))
    return results


def _best_of_level(
    pair: Tensor,
    class_logits: Tensor,
    distances: Tensor,
    centerness: Tensor,
    *,
    stride: int,
    threshold: float | None,
    topk: int,
) -> SelectedBoxes:
    """The best of the given pairs of location and class of one image's level, unordered.

    Args:
        pair: (n,) location * C + class, ascending.
        class_logits, distances, centerness: (C, H, W), (4, H, W), (1, H, W).
        stride: of the level.
        threshold: class probability times centerness must exceed it.
        topk: maximum number of results.
    """
    num_classes, _, width = class_logits.shape
    location, label = pair.div(num_classes, rounding_mode="floor"), pair % num_classes
    class_probability = class_logits.flatten(1)[label, location].float().sigmoid()
    product = class_probability * centerness.flatten()[location].float().sigmoid()
    if threshold is not None:
        keep = product > threshold
        location, label, product = location[keep], label[keep], product[keep]
    if len(product) > topk:
        product, best = product.topk(topk)
        location, label = location[best], label[best]
    boxes, points = boxes_at(location, distances, width=width, stride=stride)
    return SelectedBoxes(boxes, product.sqrt(), label, points)


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
