"""Which grid cell is responsible for which instance (SOLO, section 3.1 and 3.3.1)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from solo_d2.layers.masks import mass_centers
from solo_d2.layers.upload import upload

from ..options import check_at_least
from ..segmentor import GroundTruth


class CellTargets(NamedTuple):
    """Targets of one image.

    ``categories`` has one entry per cell of all levels (level by level, row-major): the class, or
    ``num_classes`` for background. The other three list the P positive (instance, cell) pairs,
    ordered by level, then instance, then cell; ``cell`` is row-major within its level.
    """

    categories: Tensor
    level: Tensor
    cell: Tensor
    instance: Tensor


@dataclass(kw_only=True)
class CellAssigner:
    """Assigns the instances of an image to cells.

    Args:
        num_classes, num_grids, scale_ranges, inclusive_boxes: see ``assign_cells``.
        center_sigma: its ``sigma``.
        max_positives: limit on the (instance, cell) pairs per image, which are chosen at random;
            0: all.

    Raises:
        ValueError: an argument has an unsupported value.
    """

    num_classes: int
    num_grids: Sequence[int]
    scale_ranges: Sequence[Sequence[float]]
    center_sigma: float = 0.2
    inclusive_boxes: bool = False
    max_positives: int = 0

    def __post_init__(self) -> None:
        check_at_least(0, max_positives=self.max_positives, center_sigma=self.center_sigma)

    def __call__(
        self, gt: GroundTruth, input_size: tuple[int, int], *, one_mask_per_cell: bool
    ) -> CellTargets:
        """Targets of one image in a padded input of the given size; see ``last_claims``."""
        targets = assign_cells(
            gt.boxes,
            gt.classes,
            *mass_centers(gt.masks),
            input_size,
            num_classes=self.num_classes,
            num_grids=self.num_grids,
            scale_ranges=self.scale_ranges,
            sigma=self.center_sigma,
            inclusive_boxes=self.inclusive_boxes,
        )
        if one_mask_per_cell:
            targets = last_claims(targets, self.num_grids)
        if self.max_positives and len(targets.cell) > self.max_positives:
            # chosen on the CPU, so that a seed gives the same pairs on every device
            chosen = torch.randperm(len(targets.cell))[: self.max_positives].sort().values
            chosen = chosen.to(targets.cell.device)
            targets = CellTargets(targets.categories, *(x[chosen] for x in targets[1:]))
        return targets


def assign_cells(
    boxes: Tensor,
    classes: Tensor,
    centers: Tensor,
    areas: Tensor,
    extent: tuple[int, int],
    *,
    num_classes: int,
    num_grids: Sequence[int],
    scale_ranges: Sequence[Sequence[float]],
    sigma: float,
    inclusive_boxes: bool = False,
) -> CellTargets:
    """Assign instances to grid cells.

    A level takes the instances whose sqrt(box area) lies in its range. The center region is a box
    of ``sigma`` times the instance's size around its mass center. Its cells become positive if they
    are at most one cell from the center's own (in all published code, but not in the papers). If
    two instances claim a cell, the later one gives the category; both pairs are listed.

    Args:
        boxes: (M, 4) x1, y1, x2, y2 in input pixels, right and bottom exclusive.
        classes: (M,) int64 in [0, num_classes).
        centers: (M, 2) mass center (x, y) of each mask in pixel indices.
        areas: (M,) pixels of each mask; an instance without pixels is skipped.
        extent: height and width in pixels that the grid spans, those of the padded batch.
        num_grids: cells along each axis, per level.
        scale_ranges: (low, high), both inclusive, per level.
        sigma: side of the center region in box sides.
        inclusive_boxes: take x2 - x1 - 1 as the width (the convention of mmdetection v1).
    """
    offsets = level_offsets(num_grids)
    # The numbers of all levels, (L, 1) each, in one copy to the device.
    table = [num_grids, offsets[:-1], [1.0 / grid for grid in num_grids], *zip(*scale_ranges)]
    numbers = upload(torch.tensor(table, dtype=torch.float32), boxes.device)[:, :, None]
    grids, first_cells = numbers[:2].long()
    cell_size, smallest, largest = numbers[2:]
    size = upload(torch.tensor(extent[::-1], dtype=torch.float32), boxes.device)

    # x first, then y, in the last axis of everything below
    sizes = (boxes[:, 2:] - boxes[:, :2]).float() - float(inclusive_boxes)
    scale = sizes.clamp(min=0).prod(dim=1).sqrt()
    in_level = (scale >= smallest) & (scale <= largest) & (areas > 0)

    def cell_of(coordinate: Tensor) -> Tensor:
        """(M, 2) pixels -> (L, M, 2) cell index; the float32 floor division is the original's."""
        cells = torch.div(coordinate / size, cell_size[..., None], rounding_mode="floor")
        return cells.long()

    half = 0.5 * sigma * sizes
    center, low, high = cell_of(centers), cell_of(centers - half), cell_of(centers + half)
    low = torch.maximum(low.clamp(min=0), center - 1)
    high = torch.minimum(torch.minimum(high, grids[..., None] - 1), center + 1)

    # the 3x3 cells around each center: (L, M, 2, 3) columns and rows
    around = center[..., None] + torch.arange(-1, 2, device=boxes.device)
    inside = (around >= low[..., None]) & (around <= high[..., None])
    positive = in_level[..., None, None] & inside[:, :, 1, :, None] & inside[:, :, 0, None, :]
    level, instance, i, j = positive.nonzero(as_tuple=True)
    row, column = around[level, instance, 1, i], around[level, instance, 0, j]
    cell = row * grids[level, 0] + column

    # the last instance that claims a cell; -1 (none) indexes the background after the classes
    flat = cell + first_cells[level, 0]
    owner = flat.new_full((offsets[-1],), -1)
    owner.scatter_reduce_(0, flat, instance, reduce="amax")
    categories = F.pad(classes.long(), (0, 1), value=num_classes)[owner]
    return CellTargets(categories, level, cell, instance)


def level_offsets(num_grids: Sequence[int]) -> list[int]:
    """Index of each level's first cell among the cells of all levels, and their total."""
    offsets = [0]
    for grid in num_grids:
        offsets.append(offsets[-1] + grid * grid)
    return offsets


def last_claims(targets: CellTargets, num_grids: Sequence[int]) -> CellTargets:
    """Keep one pair per cell, the one whose instance gives the category; ordered by cell.

    SOLO and Decoupled SOLO train one mask per cell; SOLOv2 trains a cell's kernel on all pairs.
    """
    offsets = upload(torch.tensor(level_offsets(num_grids)), targets.cell.device)
    flat = targets.cell + offsets[targets.level]
    # a stable sort keeps the pairs of a cell in instance order, so the last of each run wins
    order = flat.sort(stable=True).indices
    flat = flat[order]
    last = torch.ones_like(flat, dtype=torch.bool)
    last[:-1] = flat[1:] != flat[:-1]
    winners = order[last]
    return CellTargets(targets.categories, *(x[winners] for x in targets[1:]))
