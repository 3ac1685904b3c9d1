"""From category scores and soft masks to instances (SOLO, section 3.3; SOLOv2, section 3.3)."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from solo_d2.layers.masks import chunk_length
from solo_d2.layers.nms import mask_nms, matrix_nms

# (level, cells of that level) -> soft masks (n, H, W) at the scale of the suppression
MaskFunction = Callable[[int, Tensor], Tensor]


class Detections(NamedTuple):
    """N detections of one image in the order of descending scores."""

    scores: Tensor  # (N,)
    classes: Tensor  # (N,) int64
    masks: Tensor  # (N, H, W) soft, float32


def find_candidates(scores: Tensor, threshold: float, limit: int = 0) -> tuple[Tensor, Tensor]:
    """(cell, class) pairs above a threshold, in row-major order.

    Args:
        scores: (cells, classes) after point NMS.
        threshold: strict lower bound.
        limit: keep only so many of the best; 0 keeps all.

    Returns:
        (N,) cells and (N,) classes.
    """
    cells, classes = (scores > threshold).nonzero(as_tuple=True)
    if limit and len(cells) > limit:
        best = scores[cells, classes].topk(limit).indices.sort().values
        cells, classes = cells[best], classes[best]
    return cells, classes


def score_masks(soft_masks: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Area of each binarised mask, and its maskness: the mean soft value inside it (0 if empty).

    Args:
        soft_masks: (N, H, W) float32.

    Returns:
        (N,) areas in pixels, float32, and (N,) maskness.
    """
    flat = soft_masks.flatten(1)
    inside = (flat > threshold).to(flat.dtype)  # exact as float32, and faster to sum
    area = inside.sum(dim=1)
    return area, (flat * inside).sum(dim=1) / area.clamp(min=1)


def detect(
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
) -> Detections:
    """Score the candidates of one image by their masks and keep the best.

    A first pass makes the mask of every cell that has a candidate, in chunks of bounded size, for
    its area and maskness. Where they are more than a chunk they are not kept, and a second pass
    makes those of the best again. So the memory does not depend on the number of candidates, and
    classes that share a cell share its mask.

    Args:
        scores: (cells of all levels, classes) after point NMS.
        soft_masks: makes the masks of cells of a level.
        mask_size: height and width of these masks.
        level_offsets: first cell of each level, and the number of cells.
        strides: per level; a mask must have more pixels than this.
        score_threshold, mask_threshold: strict lower bounds.
        max_candidates: limit on the category score alone, 0 for none.
        topk_candidates: how many to keep.
    """
    cells, classes = find_candidates(scores, score_threshold, max_candidates)
    unique_cells, cell_of = cells.unique(return_inverse=True)

    def masks_by_level(chosen: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Masks of cells in ascending order, in chunks, each with its level."""
        bounds = torch.searchsorted(chosen, chosen.new_tensor(level_offsets)).tolist()
        for level, (start, stop) in enumerate(zip(bounds, bounds[1:])):
            if start < stop:
                for chunk in chosen[start:stop].split(length):
                    yield level, soft_masks(level, chunk - level_offsets[level])

    length = chunk_length(mask_size[0] * mask_size[1])
    keep = len(unique_cells) <= length
    # each list begins with nothing, so that it can be joined where there are no candidates
    sized, maskness = [scores.new_zeros(0, dtype=torch.bool)], [scores.new_zeros(0)]
    masks = [scores.new_zeros((0, *mask_size))]
    for level, chunk in masks_by_level(unique_cells):
        area, mean = score_masks(chunk, mask_threshold)
        sized.append(area > strides[level])
        maskness.append(mean)
        if keep:
            masks.append(chunk)
    candidate_scores = scores[cells, classes] * torch.cat(maskness)[cell_of]
    large_enough = torch.cat(sized)[cell_of].nonzero()[:, 0]
    order = candidate_scores[large_enough].sort(descending=True, stable=True).indices
    best = large_enough[order[:topk_candidates]]

    mask_of = cell_of[best]
    if not keep:
        best_cells, mask_of = cells[best].unique(return_inverse=True)
        masks.extend(chunk for _, chunk in masks_by_level(best_cells))
    return Detections(candidate_scores[best], classes[best], torch.cat(masks)[mask_of])


def suppress(
    detections: Detections,
    *,
    mask_threshold: float,
    nms_type: str,
    nms_kernel: str,
    nms_sigma: float,
    nms_finite: bool = False,
    nms_threshold: float,
    update_threshold: float,
    max_detections: int,
) -> Detections:
    """Matrix NMS ("matrix") or greedy mask NMS ("mask") and the final selection.

    Args:
        detections: in the order of descending scores.
        mask_threshold: binarises the masks for their overlaps.
        nms_type, nms_kernel, nms_sigma, nms_finite, nms_threshold: see ``solo_d2.layers.nms``.
        update_threshold: Matrix NMS only: the smallest decayed score to keep.
        max_detections: how many to keep.

    Raises:
        ValueError: ``nms_type`` is unknown.
    """
    binary = detections.masks > mask_threshold
    if nms_type == "matrix":
        scores = matrix_nms(
            binary,
            detections.classes,
            detections.scores,
            kernel=nms_kernel,
            sigma=nms_sigma,
            finite=nms_finite,
        )
        keep = scores >= update_threshold
    elif nms_type == "mask":
        scores = detections.scores
        keep = mask_nms(binary, detections.classes, iou_threshold=nms_threshold)
    else:
        raise ValueError(f"MODEL.SOLO.NMS_TYPE must be 'matrix' or 'mask', not {nms_type!r}")
    # choose first, gather the masks once
    order = scores.where(keep, -1).sort(descending=True, stable=True).indices
    order = order[: min(max_detections, int(keep.sum()))]
    return Detections(scores[order], detections.classes[order], detections.masks[order])
