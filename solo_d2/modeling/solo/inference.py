"""From category scores and soft masks to instances (SOLO, section 3.3; SOLOv2, section 3.3)."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from solo_d2.layers.masks import chunk_length
from solo_d2.layers.nms import mask_nms, matrix_nms

# (level, cells of that level) -> soft masks (n, H, W) at the resolution of NMS
MaskFunction = Callable[[int, Tensor], Tensor]


NMS_TYPES = ("matrix", "mask")


class ScoredMasks(NamedTuple):
    """M candidates or detections of one image, by descending score."""

    scores: Tensor  # (M,)
    classes: Tensor  # (M,) int64
    masks: Tensor  # (M, H, W) soft, float32


def find_candidate_cells(scores: Tensor, threshold: float, limit: int = 0) -> tuple[Tensor, Tensor]:
    """(cell, class) pairs above a threshold, in row-major order.

    Args:
        scores: (cells, classes) after point NMS.
        threshold: strict lower bound.
        limit: keep only this many, the best; 0 keeps all.

    Returns:
        (n,) cells and (n,) classes.
    """
    cells, classes = (scores > threshold).nonzero(as_tuple=True)
    if limit and len(cells) > limit:
        best = scores[cells, classes].topk(limit).indices.sort().values
        cells, classes = cells[best], classes[best]
    return cells, classes


def score_masks(soft_masks: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Area and maskness of each binarized mask. Maskness: mean soft value inside it, 0 if empty.

    Args:
        soft_masks: (n, H, W) float32.

    Returns:
        (n,) areas in pixels, float32, and (n,) maskness.
    """
    flat = soft_masks.flatten(1)
    inside = (flat > threshold).to(flat.dtype)  # exact as float32, and faster to sum
    area = inside.sum(dim=1)
    return area, (flat * inside).sum(dim=1) / area.clamp(min=1)


def detect_masks(
    scores: Tensor,
    soft_masks: MaskFunction,
    mask_size: tuple[int, int],
    *,
    level_offsets: Sequence[int],
    strides: Sequence[int],
    score_threshold: float,
    mask_threshold: float,
    max_candidates: int,
    topk_candidates: int,
) -> ScoredMasks:
    """Score the candidates of one image by their masks and keep the best.

    A first pass makes the mask of every cell that has a candidate, for its area and maskness. If
    the masks exceed one chunk, they are not stored, and a second pass makes those of the best
    candidates again. So the memory does not depend on the number of candidates. Classes that share
    a cell share its mask.

    Args:
        scores: (cells of all levels, C) after point NMS.
        soft_masks: makes the masks of cells of a level.
        mask_size: height and width of these masks.
        level_offsets: first cell of each level, and the number of cells.
        strides: per level; a mask must have more pixels than this.
        score_threshold, mask_threshold: strict lower bounds.
        max_candidates: limit on the candidates by category score alone; 0: no limit.
        topk_candidates: number of candidates to keep.
    """
    length = chunk_length(mask_size[0] * mask_size[1])
    chunks = partial(_masks_by_level, soft_masks, level_offsets, length)
    cells, classes = find_candidate_cells(scores, score_threshold, max_candidates)
    unique_cells, cell_of = cells.unique(return_inverse=True)
    fits_one_chunk = len(unique_cells) <= length
    # each list starts with an empty tensor, so that it can be concatenated without candidates
    sized, maskness = [scores.new_zeros(0, dtype=torch.bool)], [scores.new_zeros(0)]
    masks = [scores.new_zeros((0, *mask_size))]
    for level, chunk in chunks(unique_cells):
        area, mean = score_masks(chunk, mask_threshold)
        sized.append(area > strides[level])
        maskness.append(mean)
        if fits_one_chunk:
            masks.append(chunk)
    candidate_scores = scores[cells, classes] * torch.cat(maskness)[cell_of]
    large_enough = torch.cat(sized)[cell_of].nonzero()[:, 0]
    order = candidate_scores[large_enough].sort(descending=True, stable=True).indices
    best = large_enough[order[:topk_candidates]]

    mask_of = cell_of[best]
    if not fits_one_chunk:
        best_cells, mask_of = cells[best].unique(return_inverse=True)
        masks.extend(chunk for _, chunk in chunks(best_cells))
    return ScoredMasks(candidate_scores[best], classes[best], torch.cat(masks)[mask_of])


def _masks_by_level(
    soft_masks: MaskFunction, level_offsets: Sequence[int], length: int, cells: Tensor
) -> Iterator[tuple[int, Tensor]]:
    """The masks of cells in ascending order, in chunks of at most ``length``, with their level."""
    bounds = torch.searchsorted(cells, cells.new_tensor(level_offsets)).tolist()
    for level, (start, stop) in enumerate(zip(bounds, bounds[1:])):
        if start < stop:
            for chunk in cells[start:stop].split(length):
                yield level, soft_masks(level, chunk - level_offsets[level])


def suppress_masks(
    candidates: ScoredMasks,
    *,
    mask_threshold: float,
    nms_type: str,
    nms_kernel: str,
    nms_sigma: float,
    nms_finite: bool,
    nms_threshold: float,
    update_threshold: float,
    max_detections: int,
) -> ScoredMasks:
    """NMS of masks and the final selection.

    Args:
        candidates: by descending score.
        mask_threshold: binarizes the masks to compute their overlaps.
        nms_type: "matrix" for Matrix NMS, "mask" for greedy NMS by the IoU of masks.
        nms_kernel, nms_sigma, nms_finite: see ``matrix_nms``.
        nms_threshold: greedy NMS only, see ``mask_nms``.
        update_threshold: Matrix NMS only: the smallest decayed score to keep.
        max_detections: number of detections to keep.
    """
    binary = candidates.masks > mask_threshold
    if nms_type == "matrix":
        scores = matrix_nms(
            binary,
            candidates.classes,
            candidates.scores,
            kernel=nms_kernel,
            sigma=nms_sigma,
            finite=nms_finite,
        )
        keep = scores >= update_threshold
    else:
        scores = candidates.scores
        keep = mask_nms(binary, candidates.classes, iou_threshold=nms_threshold)
    # select first, so that the masks are gathered only once
    order = scores.where(keep, -1).sort(descending=True, stable=True).indices
    order = order[: min(max_detections, int(keep.sum()))]
    return ScoredMasks(scores[order], candidates.classes[order], candidates.masks[order])
