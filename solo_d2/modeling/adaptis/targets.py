"""Which points AdaptIS is trained on, and for what. Points are (row, column) in input pixels."""

from typing import NamedTuple

import torch
from detectron2.utils import comm
from torch import Tensor, nn

from .losses import IGNORE

# Regions to ignore that are smaller are never drawn as such (Cityscapes).
_MIN_IGNORED_AREA = 10


class PointTargets(NamedTuple):
    """N points of one image and what lies under each."""

    points: Tensor  # (N, 2) float32
    masks: Tensor  # (N, H, W) int8: 1 object, 0 rest, -1 ignored


def topmost(masks: Tensor) -> Tensor:
    """Which mask is seen at each pixel, where smaller ones lie on top of larger ones.

    Args:
        masks: (M, H, W) bool.

    Returns:
        (H, W) int64: an index, or -1 where there is none. The last of equally large ones is seen.
    """
    if len(masks) == 0:
        return torch.full(masks.shape[1:], -1, dtype=torch.long, device=masks.device)
    order = masks.flatten(1).sum(dim=1).flip(0).sort(stable=True).indices
    order = len(masks) - 1 - order
    # the maximum of a bool is its first True
    covered, first = masks[order].view(torch.uint8).max(dim=0)
    return torch.where(covered > 0, order[first], -1)


def draw_points(
    masks: Tensor,
    crowds: Tensor,
    num_points: int,
    *,
    from_one_object: bool = False,
    min_area: int = 0,
    ignored_prob: float = 0.0,
    generator: torch.Generator | None = None,
) -> PointTargets:
    """Draw an object for each point, uniformly, then a pixel uniformly among its visible ones.

    Objects are drawn with replacement. Without any visible object all points are (0, 0) and all
    targets ignored.

    Args:
        masks: (M, H, W) bool, of the objects.
        crowds: (K, H, W) bool, of regions that are neither object nor background.
        num_points: N.
        from_one_object: draw one object for all points.
        min_area: objects of which fewer pixels are visible are ignored, as crowds are.
        ignored_prob: of drawing an ignored region in place of an object: its pixels have target -1,
            all others 0.
        generator: on the CPU; default: PyTorch's own.
    """
    device = masks.device
    # drawn on the CPU, so that a seed means the same points on every device
    random = torch.rand((num_points, 3), generator=generator, dtype=torch.float64).to(device)
    which = random[:1, 0].expand(num_points) if from_one_object else random[:, 0]
    owner = topmost(masks)
    visible = owner[owner >= 0].bincount(minlength=len(masks))
    candidates = (visible >= max(1, min_area)).nonzero()[:, 0]
    if len(candidates) == 0:
        points = torch.zeros((num_points, 2), device=device)
        nothing = torch.full((1, *masks.shape[1:]), IGNORE, dtype=torch.int8, device=device)
        return PointTargets(points, nothing.repeat(num_points, 1, 1))
    chosen = candidates[(which * len(candidates)).long()]
    points = _draw_pixels(owner, chosen, random[:, 1])
    targets = masks[chosen].to(torch.int8)
    if ignored_prob > 0:
        small = ((visible > 0) & (visible < min_area)).nonzero()[:, 0]
        regions = torch.cat([crowds, owner == small[:, None, None]])
        regions = regions[regions.flatten(1).sum(dim=1) >= _MIN_IGNORED_AREA]
        owner = topmost(regions)
        candidates = owner[owner >= 0].unique()
        swapped = (random[:, 2] < ignored_prob) & (len(candidates) > 0)
        chosen = candidates[(which[swapped] * len(candidates)).long()]
        points[swapped] = _draw_pixels(owner, chosen, random[swapped, 1])
        targets[swapped] = -regions[chosen].to(torch.int8)
    return PointTargets(points, targets)


def _draw_pixels(owner: Tensor, wanted: Tensor, random: Tensor) -> Tensor:
    """For each wanted index of a map (H, W) one of its pixels; ``random`` is in [0, 1)."""
    pixels = (owner >= 0).nonzero()
    owners, order = owner[owner >= 0].sort(stable=True)
    counts = owners.bincount()
    first = counts.cumsum(0) - counts
    return pixels[order[first[wanted] + (random * counts[wanted]).long()]].float()


def targets_of_points(points: Tensor, masks: Tensor) -> PointTargets:
    """The topmost object under each given point; nothing there: all ignored.

    Args:
        points: (N, 2) rows and columns.
        masks: (M, H, W) bool.
    """
    owner = topmost(masks)
    rows, columns = points.round().long().unbind(1)
    index = owner[rows.clamp(0, owner.shape[0] - 1), columns.clamp(0, owner.shape[1] - 1)]
    nothing = torch.full((1, *masks.shape[1:]), IGNORE, dtype=torch.int8, device=masks.device)
    return PointTargets(points, torch.cat([masks.to(torch.int8), nothing])[index])


def paint_semantic(masks: Tensor, classes: Tensor, crowds: Tensor, *, num_stuff: int) -> Tensor:
    """Semantic labels of an image that has none: stuff 0 is the background.

    Args:
        masks: (M, H, W) bool, of the objects.
        classes: (M,) in [0, number of thing classes).
        crowds: (K, H, W) bool; ignored where no object is seen.
        num_stuff: label of the first thing class.

    Returns:
        (H, W) int64.
    """
    owner = topmost(masks)
    labels = torch.cat([classes.long() + num_stuff, classes.new_zeros(1).long()])[owner]
    return labels.masked_fill((owner < 0) & crowds.any(dim=0), IGNORE)


class AdaptiveThreshold(nn.Module):
    """A mask threshold that follows the best mean IoU by small steps. It is state: a buffer."""

    value: Tensor

    def __init__(self, initial: float, *, step: float = 0.025, momentum: float = 0.99):
        """
        Args:
            initial: threshold before the first update.
            step: distance of the two rivals that the threshold is compared with.
            momentum: the share of the old value in the new one.
        """
        super().__init__()
        self.register_buffer("value", torch.tensor(initial, dtype=torch.float64))
        self.step = step
        self.momentum = momentum

    @torch.no_grad()
    def update(self, probs: Tensor, targets: Tensor) -> Tensor:
        """Move towards the best of three thresholds for a batch, that of all processes together.

        Args:
            probs: (n, H, W) soft masks.
            targets: (n, H, W): 1 object, 0 rest, -1 ignored.

        Returns:
            The mean IoU at the best threshold; 0 if no sample has a pixel of an object, and then
            the threshold stays.
        """
        rivals = self.value + self.step * self.value.new_tensor([0, -1, 1])
        iou = torch.stack([mask_iou(probs, targets, rival) for rival in rivals])
        known = iou >= 0
        sums = torch.stack([(iou * known).sum(dim=1), known.sum(dim=1).double()])
        sums = torch.cat([sums.flatten(), (targets > 0).any().double()[None]])
        if comm.get_world_size() > 1:
            torch.distributed.all_reduce(sums)
        total, count = sums[:-1].view(2, 3)
        mean = total / count.clamp(min=1)
        best = mean.argmax()  # the first of equal ones
        moved = self.momentum * self.value + (1 - self.momentum) * rivals[best]
        self.value.copy_(torch.where(sums[-1] > 0, moved, self.value))
        return torch.where(sums[-1] > 0, mean[best], 0.0)


def mask_iou(probs: Tensor, targets: Tensor, threshold: Tensor | float) -> Tensor:
    """IoU of thresholded masks without the ignored pixels, float64; -1 for an empty union.

    Args:
        probs: (n, H, W).
        targets: (n, H, W): 1 object, 0 rest, -1 ignored.
        threshold: a pixel is set where its probability exceeds this.
    """
    predicted = ((probs > threshold) & (targets != IGNORE)).flatten(1)
    true = (targets > 0).flatten(1)
    union = (predicted | true).sum(dim=1)
    iou = (predicted & true).sum(dim=1).double() / union.clamp(min=1)
    return torch.where(union > 0, iou, -1.0)


def mask_quality(probs: Tensor, targets: Tensor) -> Tensor:
    """(n,) float64: the mean probability inside each object; 0 for an empty one.

    Targets are taken as numbers, as published: an ignored pixel, -1, counts against the mask.
    """
    weight = targets.flatten(1).double()
    inside = (probs.flatten(1).double() * weight).sum(dim=1)
    return inside / weight.sum(dim=1).clamp(min=1)


def score_targets(iou: Tensor, quality: Tensor) -> Tensor:
    """The published rule: graded targets for all points but the worst of an object.

    Args:
        iou, quality: (B, N), of N points on one object of each of B images.

    Returns:
        (B, N): 0 for bad points, up to 1 for good ones; -1 for a whole image where the masks tell
        nothing about its points.
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
    """The paper's rule: the best fifth of the points by IoU is 1, the rest 0; else as above."""
    rank = iou.sort(dim=1, descending=True, stable=True).indices.argsort(dim=1)
    num_positive = max(1, -(-iou.shape[1] // 5))
    return _skip_unknown((rank < num_positive).to(iou.dtype), iou)


def dual_targets(iou: Tensor, quality: Tensor | None = None) -> Tensor:
    """As ``top20_targets``, but only the worst half is 0 and what lies between is -1."""
    rank = iou.sort(dim=1, descending=True, stable=True).indices.argsort(dim=1)
    n = iou.shape[1]
    num_positive = max(1, -(-n // 5))
    targets = torch.full_like(iou, IGNORE)
    targets[rank >= max(num_positive, n - n // 2)] = 0
    targets[rank < num_positive] = 1
    return _skip_unknown(targets, iou)


PROPOSAL_TARGETS = {"score": score_targets, "top20": top20_targets, "dual": dual_targets}


def _skip_unknown(targets: Tensor, iou: Tensor) -> Tensor:
    unknown = (iou.amin(dim=1) < 0) | (iou.amax(dim=1) < 1e-5)
    return targets.masked_fill(unknown[:, None], IGNORE)


def dense_targets(
    points: Tensor,
    targets: Tensor,
    sampled: Tensor,
    objects: Tensor,
    *,
    mask_unsampled: bool = True,
    background: bool = False,
) -> Tensor:
    """Paint the targets of points into maps, with zeros elsewhere.

    Args:
        points: (B, N, 2) rows and columns.
        targets: (B, N) in [0, 1] or -1.
        sampled: (B, H, W) bool, the objects that have points.
        objects: (B, H, W) bool, all objects.
        mask_unsampled: ignore all that is not a sampled object, so that an object without points
            is no negative.
        background: with ``mask_unsampled``, let the pixels outside all objects count as well.

    Returns:
        (B, H, W): targets, -1 where ignored.
    """
    maps = torch.zeros(sampled.shape, dtype=targets.dtype, device=targets.device)
    rows, columns = points.long().unbind(-1)
    image = torch.arange(len(points), device=points.device)[:, None]
    maps[image, rows, columns] = targets
    if mask_unsampled:
        counted = sampled | ~objects if background else sampled
        maps = maps.masked_fill(~counted, IGNORE)
    # an image whose masks tell nothing about its points has no dense targets either
    unknown = (targets == IGNORE).all(dim=1)
    return maps.masked_fill(unknown[:, None, None], IGNORE)
