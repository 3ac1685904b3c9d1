"""Which anchor belongs to which object."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from solo_d2.layers.boxes import box_areas, box_intersections, box_ious
from solo_d2.layers.masks import chunk_length
from solo_d2.layers.resample import resize

from .anchors import to_corners

IGNORED, BACKGROUND = -1, 0


class Matches(NamedTuple):
    """What each of P anchors stands for."""

    labels: Tensor  # (P,) int64: class + 1, or BACKGROUND, or IGNORED
    objects: Tensor  # (P,) int64: the object, of use where the label is a class


def match(
    boxes: Tensor,
    classes: Tensor,
    crowd_boxes: Tensor,
    priors: Tensor,
    *,
    iou_thresholds: tuple[float, float] = (0.4, 0.5),
    crowd_threshold: float = 0.7,
) -> Matches:
    """Match the anchors of one image with its objects.

    An anchor takes the object of its best IoU and is positive, ignored or background by that IoU.
    Then every object gets an anchor of its own, however low their IoU; see ``own_priors``.

    Args:
        boxes: (N, 4) x1, y1, x2, y2, relative; N may be 0.
        classes: (N,) int64, without background.
        crowd_boxes: (M, 4); background anchors that lie in one are ignored.
        priors: (P, 4) center x, center y, width, height, relative.
        iou_thresholds: below the first is background; from the second on, positive.
        crowd_threshold: an anchor with more than this share of its area in a crowd lies in it.
    """
    corners = to_corners(priors)
    if len(boxes):
        ious = box_ious(boxes, corners)
        best, objects = ious.max(dim=0)
        own = own_priors(ious)
        served = (own >= 0).nonzero()[:, 0]  # all, but where there are fewer anchors than objects
        best[own[served]] = 2.0
        objects[own[served]] = served
        low, high = iou_thresholds
        labels = classes[objects] + 1
        labels[best < high] = IGNORED
        labels[best < low] = BACKGROUND
    else:
        objects = torch.zeros(len(priors), dtype=torch.long, device=priors.device)
        labels = torch.full_like(objects, BACKGROUND)
    if len(crowd_boxes):
        share = box_intersections(crowd_boxes, corners) / box_areas(corners)
        in_crowd = share.amax(dim=0) > crowd_threshold
        labels[in_crowd & (labels <= BACKGROUND)] = IGNORED
    return Matches(labels, objects)


def own_priors(ious: Tensor) -> Tensor:
    """One anchor for each object: the pair of the highest IoU first, then of what is left.

    Which is the order of the published code. Here each round takes, together, all pairs that are
    the best both for their object and for their anchor, since none of these can stand in the way
    of another; two or three rounds settle nearly all images. Of equal pairs the first object's
    goes first, and of these the first anchor.

    Args:
        ious: (N, P), N > 0.

    Returns:
        (N,) int64 indices of anchors, all different; -1 where none was left.
    """
    ious = ious.clone()
    own = ious.new_full((len(ious),), -1, dtype=torch.long)
    while True:
        value, prior = ious.max(dim=1)
        rivals = ious[:, prior]  # (N, N): IoU of object i with the anchor that j wants
        order = torch.arange(len(ious), device=ious.device)
        wins = (rivals.argmax(dim=0) == order) & (value >= 0)
        if not wins.any():
            return own
        own[wins] = prior[wins]
        ious[wins] = -1
        ious[:, prior[wins]] = -1


def reduce_masks(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Shrink masks: bilinear without antialiasing, then more than one half.

    Args:
        masks: (N, H, W) bool.
        size: height and width of the result.

    Returns:
        (N, *size) bool.
    """
    parts = [
        resize(chunk[:, None].float(), size)[:, 0] > 0.5
        for chunk in masks.split(chunk_length(masks.shape[1] * masks.shape[2]))
    ]
    return torch.cat(parts)


def semantic_target(masks: Tensor, classes: Tensor, num_classes: int) -> Tensor:
    """Union of the masks of each class.

    Args:
        masks: (N, h, w) bool.
        classes: (N,) int64.
        num_classes: C.

    Returns:
        (C, h, w) float32, 0 or 1.
    """
    members = F.one_hot(classes, num_classes).float()
    counts = members.T @ masks.flatten(1).float()
    return (counts > 0).float().view(num_classes, *masks.shape[1:])
