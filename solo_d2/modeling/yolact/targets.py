"""Ground truth at the network's input size, and the matching of anchors with objects."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from detectron2.structures import BitMasks, Instances, PolygonMasks
from torch import Tensor
from torch.nn import functional as F

from solo_d2.layers.boxes import box_areas, box_intersections, box_ious
from solo_d2.layers.masks import chunk_length
from solo_d2.layers.resample import resize

from .anchors import to_corners

IGNORED, BACKGROUND = -1, 0


class Matches(NamedTuple):
    """The targets of the P anchors of an image."""

    labels: Tensor  # (P,) int64: class + 1, or BACKGROUND, or IGNORED
    objects: Tensor  # (P,) int64: the object, meaningful where the label is a class


def resize_instances(
    instances: Instances, size: tuple[int, int], device: torch.device
) -> Instances:
    """Ground truth of an image that is resized to ``size``, with its masks on ``device``.

    Polygons are scaled. Bit masks are resized like the image and set where they are one half or
    more.
    """
    height, width = instances.image_size
    y, x = size[0] / height, size[1] / width
    resized = Instances(size, **instances.get_fields())
    if instances.has("gt_boxes"):
        boxes = instances.gt_boxes.clone()
        boxes.scale(x, y)
        resized.gt_boxes = boxes
    if instances.has("gt_masks"):
        masks = instances.gt_masks
        if isinstance(masks, PolygonMasks):
            resized.gt_masks = PolygonMasks(
                [[(p.reshape(-1, 2) * (x, y)).flatten() for p in m] for m in masks.polygons]
            )
        else:
            (bits,) = _resize_masks(masks.tensor.to(device), [size], torch.ge)
            resized.gt_masks = BitMasks(bits)
    return resized


def match(
    boxes: Tensor,
    classes: Tensor,
    crowd_boxes: Tensor,
    anchors: Tensor,
    *,
    iou_thresholds: tuple[float, float] = (0.4, 0.5),
    crowd_threshold: float = 0.7,
    min_size: float = 0.0,
) -> Matches:
    """Match the anchors of one image with its objects.

    Each anchor is matched with the object of highest IoU, and that IoU makes it positive, ignored
    or background. Then every object gets an anchor of its own, even if their IoU is low; see
    ``force_match``.

    Args:
        boxes: (M, 4) x1, y1, x2, y2, relative; M may be 0.
        classes: (M,) int64, without background.
        crowd_boxes: (m, 4) of crowd regions; background anchors inside one are ignored.
        anchors: (P, 4) center x, center y, width, height, relative.
        iou_thresholds: below the first is background; from the second on, positive.
        crowd_threshold: an anchor counts as inside if more than this share of its area is.
        min_size: objects that are not wider and higher than this get no anchor.
    """
    corners = to_corners(anchors)
    if len(boxes):
        usable = have_area(boxes, min_size)
        ious = box_ious(boxes, corners).masked_fill(~usable[:, None], -1)
        best, objects = ious.max(dim=0)
        # objects without an anchor of their own share an index after the last anchor
        own = force_match(ious)
        place = torch.where(own < 0, len(anchors), own)
        index = torch.arange(len(boxes), device=boxes.device)
        best = F.pad(best, (0, 1)).index_fill(0, place, 2.0)[:-1]
        objects = F.pad(objects, (0, 1)).scatter(0, place, index)[:-1]
        low, high = iou_thresholds
        labels = classes[objects] + 1
        labels = labels.masked_fill(best < high, IGNORED).masked_fill(best < low, BACKGROUND)
    else:
        objects = torch.zeros(len(anchors), dtype=torch.long, device=anchors.device)
        labels = torch.full_like(objects, BACKGROUND)
    if len(crowd_boxes):
        share = box_intersections(crowd_boxes, corners) / box_areas(corners)
        in_crowd = share.amax(dim=0) > crowd_threshold
        labels = labels.masked_fill(in_crowd & (labels <= BACKGROUND), IGNORED)
    return Matches(labels, objects)


def have_area(boxes: Tensor, min_size: float) -> Tensor:
    """(M, 4) x1, y1, x2, y2 -> (M,) bool: wider and higher than ``min_size``."""
    return (boxes[:, 2:] - boxes[:, :2] > min_size).all(dim=1)


def force_match(ious: Tensor) -> Tensor:
    """One anchor for each object: the pair of the highest IoU first, then of the remaining ones.

    This is the order of the published code. Here each round takes all pairs at once that are the
    best both for their object and for their anchor, since these cannot affect each other. Nearly
    all images need two or three rounds, so only every second one waits for the device to see
    whether it was the last. Ties go to the first object, then to the first anchor.

    Args:
        ious: (M, P); an object with negative IoUs gets no anchor.

    Returns:
        (M,) int64 indices of anchors, all different; -1 where none was left.
    """
    num_objects, num_anchors = ious.shape
    order = torch.arange(num_objects, device=ious.device)
    own = torch.full_like(order, -1)
    for round_index in range(num_objects):
        value, anchor = ious.max(dim=1)
        rivals = ious[:, anchor]  # (M, M): IoU of object i with the best anchor of object j
        wins = (rivals.argmax(dim=0) == order) & (value >= 0)
        if round_index % 2 and not wins.any():
            break
        own = torch.where(wins, anchor, own)
        # pairs that did not win mark an index after the last anchor
        taken = torch.zeros(num_anchors + 1, dtype=torch.bool, device=ious.device)
        taken.index_fill_(0, torch.where(wins, anchor, num_anchors), True)
        ious = ious.masked_fill(wins[:, None] | taken[:-1], -1)
    return own


def shrink_masks(masks: Tensor, *sizes: tuple[int, int]) -> list[Tensor]:
    """Shrink masks: bilinear without antialiasing, set where the result exceeds one half.

    Args:
        masks: (M, H, W) bool.
        sizes: heights and widths of the results.

    Returns:
        (M, *size) bool for each size.
    """
    return _resize_masks(masks, sizes, torch.gt)


def _resize_masks(
    masks: Tensor,
    sizes: Sequence[tuple[int, int]],
    compare: Callable[[Tensor, float], Tensor],
) -> list[Tensor]:
    """(M, H, W) bool -> (M, *size) bool for each size: bilinear, then compared with one half."""
    parts: list[list[Tensor]] = [[] for _ in sizes]
    for chunk in masks.split(chunk_length(masks.shape[1] * masks.shape[2], masks.device)):
        soft = chunk[:, None].float()
        for part, size in zip(parts, sizes):
            part.append(compare(resize(soft, size)[:, 0], 0.5))
    return [torch.cat(part) for part in parts]


def semantic_target(masks: Tensor, classes: Tensor, usable: Tensor, num_classes: int) -> Tensor:
    """Union of the masks of each class.

    Args:
        masks: (M, h, w) bool.
        classes: (M,) int64.
        usable: (M,) bool; other masks are skipped.
        num_classes: C.

    Returns:
        (C, h, w) float32, 0 or 1.
    """
    members = (F.one_hot(classes, num_classes) * usable[:, None]).float()
    counts = members.T @ masks.flatten(1).float()
    return (counts > 0).float().view(num_classes, *masks.shape[1:])
