"""Sampling points, and the training targets of AdaptIS at them.

Points are (row, column) in pixels of the network's input; see the shape shorthand in ``adaptis``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..options import check_at_least, check_fractions
from ..segmentor import GroundTruth

IGNORE = -1

# Smaller ignored regions are never sampled (as published for Cityscapes).
_MIN_IGNORED_AREA = 10


def to_input_frame(points: Any, original: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Check points given by a user and convert them for the network.

    Args:
        points: (P, 2), x and y in pixels of the original image; anything convertible to a tensor.
        original: height and width of the original image.
        size: height and width of the network's input without padding.

    Returns:
        (P, 2) float32 rows and columns in the network's input.

    Raises:
        ValueError: there is no point, or one is not two numbers or lies outside the image.
    """
    points = torch.as_tensor(points, dtype=torch.float32)
    if points.numel() == 0:
        raise ValueError("no points; give at least one (x, y)")
    if points.dim() != 2 or points.shape[1] != 2:
        raise ValueError(f"points must be (P, 2), x and y of each, not {tuple(points.shape)}")
    height, width = original
    for number, (x, y) in enumerate(points.tolist()):
        if not (0 <= x < width and 0 <= y < height):  # NaN fails both comparisons
            what = "is not a number" if x != x or y != y else "is outside the image"
            raise ValueError(
                f"point {number} (x={x:g}, y={y:g}) {what}; the image has {width} x {height} pixels"
            )
    scale = points.new_tensor([size[0] / height, size[1] / width])
    return points.flip(1) * scale


def set_padding(maps: Tensor, image_sizes: Sequence[tuple[int, int]], value: int) -> None:
    """Fill (N, ..., H, W) outside the images with ``value``, in place."""
    for image, (h, w) in zip(maps, image_sizes):
        image[..., h:, :] = value
        image[..., w:] = value


def topmost(masks: Tensor) -> Tensor:
    """Index of the visible mask at each pixel, with smaller masks on top of larger ones.

    Args:
        masks: (M, H, W) bool.

    Returns:
        (H, W) int64: an index, or -1 where there is no mask. Of equally large masks, the last one
        is on top.
    """
    if len(masks) == 0:
        return torch.full(masks.shape[1:], -1, dtype=torch.long, device=masks.device)
    order = masks.flatten(1).sum(dim=1).flip(0).sort(stable=True).indices
    order = len(masks) - 1 - order
    # the maximum of a bool is its first True
    covered, first = masks[order].view(torch.uint8).max(dim=0)
    return torch.where(covered > 0, order[first], -1)


@dataclass(frozen=True)
class PointSampler:
    """Samples an object for each point, uniformly, then one of its visible pixels, uniformly.

    Objects are sampled with replacement. If no object is visible, all points are (0, 0) and all
    targets are ignored. Nothing here synchronizes with the device.
    """

    # P, points per image.
    num_points: int = 12
    # Sample one object for all points of an image.
    from_one_object: bool = False
    # Objects with fewer visible pixels are not sampled; like crowds, they are ignored regions.
    min_area: int = 0
    # Probability of sampling an ignored region instead of an object. Its pixels have target -1, all
    # others 0. (Published for Cityscapes: 0.025.)
    ignored_prob: float = 0.0

    def __post_init__(self) -> None:
        check_at_least(1, num_points=self.num_points)
        check_fractions(ignored_prob=self.ignored_prob)

    def __call__(
        self, masks: Tensor, crowds: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """
        Args:
            masks: (M, H, W) bool, of the objects.
            crowds: (number of crowds, H, W) bool: neither object nor background.
            generator: a CPU generator; by default PyTorch's own.

        Returns:
            (P, 2) float32 points, and (P, H, W) int8 masks of the objects under them: 1 object,
            0 rest, -1 ignored.
        """
        # sampled on the CPU, so that a seed gives the same points on every device
        shape = (self.num_points, 3)
        random = torch.rand(shape, generator=generator).to(masks.device, non_blocking=True)
        which, pixel, swap = random.unbind(1)
        if self.from_one_object:
            which = which[:1].expand(self.num_points)
        owner = topmost(masks)
        area = label_areas(owner + 1, len(masks) + 1)[1:]
        points, chosen, found = _draw(owner, area, area >= max(1, self.min_area), which, pixel)
        targets = torch.where(found, _rows(masks, chosen).to(torch.int8), IGNORE)
        if self.ignored_prob > 0:
            small = owner == torch.arange(len(masks), device=masks.device)[:, None, None]
            small &= (area < self.min_area)[:, None, None]
            regions = torch.cat([crowds, small])
            regions &= (regions.flatten(1).sum(dim=1) >= _MIN_IGNORED_AREA)[:, None, None]
            owner = topmost(regions)
            area = label_areas(owner + 1, len(regions) + 1)[1:]
            in_regions, chosen, any_region = _draw(owner, area, area > 0, which, pixel)
            swapped = (swap < self.ignored_prob) & found & any_region
            points = torch.where(swapped[:, None], in_regions, points)
            ignored = -_rows(regions, chosen).to(torch.int8)
            targets = torch.where(swapped[:, None, None], ignored, targets)
        return points, targets


def label_areas(labels: Tensor, count: int) -> Tensor:
    """(count,) int64: number of pixels of each label in [0, count); ``bincount`` reads its input.

    Args:
        labels: int64, any shape.
        count: number of labels.
    """
    flat = labels.flatten()
    return flat.new_zeros(count).scatter_add_(0, flat, torch.ones_like(flat))


def _draw(
    owner: Tensor, area: Tensor, eligible: Tensor, which: Tensor, pixel: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Turn uniform random numbers into masks and pixels of these masks.

    Args:
        owner: (H, W), result of ``topmost``.
        area: (M,), number of visible pixels of each mask.
        eligible: (M,) bool, masks that may be sampled; each has a visible pixel.
        which, pixel: (P,) in [0, 1).

    Returns:
        (P, 2) float32 points, (P,) int64 indices of their masks, and () bool, whether any mask is
        eligible. If not, points are (0, 0) and indices mean nothing.
    """
    count = eligible.sum()
    # the product may round up to the count
    number = (which * count).long().minimum(count - 1)
    chosen = torch.searchsorted(eligible.cumsum(0), number, right=True)
    # the pixels grouped by mask, in raster order; those without a mask come first
    pixels = owner.flatten().short().sort(stable=True).indices
    # a 0 after the last mask, for an index that means nothing
    area = torch.cat([area, area.new_zeros(1)])
    first = owner.numel() - area.sum() + area.cumsum(0) - area
    place = first[chosen] + (pixel * area[chosen]).long().minimum(area[chosen] - 1)
    index = pixels[place.clamp(0, owner.numel() - 1)]
    points = torch.stack([index // owner.shape[1], index % owner.shape[1]], dim=1)
    return torch.where(count > 0, points, 0).float(), chosen, count > 0


def _rows(masks: Tensor, index: Tensor) -> Tensor:
    """``masks[index]``, or zeros if there are no masks."""
    if len(masks) == 0:
        return masks.new_zeros((len(index), *masks.shape[1:]))
    return masks[index.clamp(max=len(masks) - 1)]


def targets_of_points(points: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """The topmost object under each given point; if there is none, all pixels are ignored.

    Args:
        points: (P, 2) rows and columns.
        masks: (M, H, W) bool.

    Returns:
        See ``PointSampler``.
    """
    owner = topmost(masks)
    rows, columns = points.round().long().unbind(1)
    index = owner[rows.clamp(0, owner.shape[0] - 1), columns.clamp(0, owner.shape[1] - 1)]
    nothing = torch.full((1, *masks.shape[1:]), IGNORE, dtype=torch.int8, device=masks.device)
    return points, torch.cat([masks.to(torch.int8), nothing])[index]


def semantic_labels(gt: GroundTruth, given: Tensor | None, *, num_classes: int) -> Tensor:
    """Semantic labels of an image in its batch: given ones, or painted from the instances.

    Args:
        gt: annotations; masks are (M, H, W).
        given: (h, w) labels of the unpadded image, stuff before things; others than the classes are
            ignored, such as Detectron2's 255. None: class 0 where there is no object, then things.
        num_classes: number of stuff and thing classes.

    Returns:
        (H, W) int64, -1 in the padding, and for painted ones in crowds where no object is visible.
    """
    h, w = gt.image_size
    labels = torch.full(gt.masks.shape[1:], IGNORE, dtype=torch.long, device=gt.masks.device)
    if given is None:
        owner = topmost(gt.masks)
        labels_of = torch.cat([gt.classes.long() + 1, gt.classes.new_zeros(1).long()])
        painted = labels_of[owner].masked_fill((owner < 0) & gt.crowd_masks.any(dim=0), IGNORE)
        labels[:h, :w] = painted[:h, :w]
    else:
        given = given.to(labels.device).long()
        labels[:h, :w] = given.where((given >= 0) & (given < num_classes), IGNORE)
    return labels


def score_targets(iou: Tensor, quality: Tensor) -> Tensor:
    """The published code's rule: graded targets for all points but the worst of an object.

    Args:
        iou, quality: (N, P), for P points on one object of each of N images.

    Returns:
        (N, P): 0 for bad points, up to 1 for good ones; -1 for all points of an image if an IoU is
        undefined or all of them are 0.
    """
    score = iou * quality
    lowest, highest = iou.aminmax(dim=1, keepdim=True)
    bar = torch.where(
        highest - lowest > 0.1,
        0.95 * torch.quantile(score, 0.3, dim=1, keepdim=True),
        0.99 * score.amin(dim=1, keepdim=True),
    )
    good = score > bar
    best = score.masked_fill(~good, -torch.inf).amax(dim=1, keepdim=True)
    worst = score.masked_fill(~good, torch.inf).amin(dim=1, keepdim=True)
    spread = best - worst
    graded = 0.7 + 0.3 * (score - worst) / spread.clamp(min=1e-3)
    return _skip_unknown(torch.where(good, torch.where(spread > 1e-3, graded, 1.0), 0.0), iou)


def top20_targets(iou: Tensor, quality: Tensor | None = None) -> Tensor:
    """The paper's rule: 1 for the best fifth of the points by IoU, 0 for the rest."""
    rank, num_best = _rank(iou)
    return _skip_unknown((rank < num_best).to(iou.dtype), iou)


def dual_targets(iou: Tensor, quality: Tensor | None = None) -> Tensor:
    """Like ``top20_targets``, but only the worst half is 0; points in between are -1."""
    rank, num_best = _rank(iou)
    is_worst = rank >= iou.shape[1] - iou.shape[1] // 2
    targets = torch.where(is_worst, 0.0, float(IGNORE)).masked_fill(rank < num_best, 1)
    return _skip_unknown(targets, iou)


def _rank(iou: Tensor) -> tuple[Tensor, int]:
    """(N, P) ranks, 0 for the best; and a fifth of P, rounded up."""
    rank = iou.sort(dim=1, descending=True, stable=True).indices.argsort(dim=1)
    return rank, -(-iou.shape[1] // 5)


PROPOSAL_TARGETS = {"score": score_targets, "top20": top20_targets, "dual": dual_targets}


def _skip_unknown(targets: Tensor, iou: Tensor) -> Tensor:
    unknown = (iou.amin(dim=1) < 0) | (iou.amax(dim=1) < 1e-5)
    return targets.masked_fill(unknown[:, None], IGNORE)
