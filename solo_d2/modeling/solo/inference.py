"""From category scores and soft masks to instances (SOLO, section 3.3; SOLOv2, section 3.3)."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from detectron2.config import CfgNode
from torch import Tensor

from solo_d2.layers.masks import chunk_length
from solo_d2.layers.nms import MATRIX_NMS_KERNELS, mask_nms, matrix_nms
from solo_d2.layers.upload import upload

from ..options import check_at_least, check_choice, check_fractions

# (level, cells of that level) -> soft masks (n, H, W) at the resolution of NMS
MaskFunction = Callable[[int, np.ndarray], Tensor]


class Candidates(NamedTuple):
    """(cell, class) pairs of one image in row-major order, on the host."""

    cells: np.ndarray  # (n,) int64, among the cells of all levels
    classes: np.ndarray  # (n,) int64
    scores: Tensor  # (n,)


class ScoredMasks(NamedTuple):
    """M candidates or detections of one image, by descending score."""

    scores: Tensor  # (M,)
    classes: Tensor  # (M,) int64
    masks: Tensor  # (M, H, W) soft, float32


@dataclass(kw_only=True)
class Detector:
    """Chooses the instances of an image: ``find``, then ``rank``, then ``suppress``.

    Args:
        score_threshold: candidates have a higher category score.
        mask_threshold: a pixel belongs to a mask where its soft value exceeds this.
        max_candidates: limit on the candidates by category score alone; 0: no limit.
        topk_candidates: number of masks that enter NMS.
        nms_type: "matrix" for Matrix NMS, "mask" for greedy NMS by the IoU of masks.
        nms_kernel, nms_sigma, nms_finite: see ``matrix_nms``.
        update_threshold: Matrix NMS only: the smallest decayed score to keep.
        nms_threshold: greedy NMS only, see ``mask_nms``.
        max_detections: number of detections to keep.

    Raises:
        ValueError: an argument has an unsupported value.
    """

    score_threshold: float = 0.1
    mask_threshold: float = 0.5
    max_candidates: int = 0
    topk_candidates: int = 500
    nms_type: str = "matrix"
    nms_kernel: str = "gaussian"
    nms_sigma: float = 2.0
    nms_finite: bool = False
    update_threshold: float = 0.05
    nms_threshold: float = 0.5
    max_detections: int = 100

    def __post_init__(self) -> None:
        check_choice("nms_type", self.nms_type, ("matrix", "mask"))
        check_choice("nms_kernel", self.nms_kernel, MATRIX_NMS_KERNELS)
        for name in ("max_candidates", "topk_candidates", "max_detections"):
            check_at_least(0, **{name: getattr(self, name)})
        for name in ("score_threshold", "mask_threshold", "update_threshold", "nms_threshold"):
            check_fractions(**{name: getattr(self, name)})
        if not self.nms_sigma > 0:
            raise ValueError(f"nms_sigma must be positive, not {self.nms_sigma!r}")

    @classmethod
    def from_config(cls, cfg: CfgNode) -> "Detector":
        solo = cfg.MODEL.SOLO
        return cls(
            score_threshold=solo.SCORE_THRESH_TEST,
            mask_threshold=solo.MASK_THRESH_TEST,
            max_candidates=solo.MAX_CANDIDATES_TEST,
            topk_candidates=solo.TOPK_CANDIDATES_TEST,
            nms_type=solo.NMS_TYPE,
            nms_kernel=solo.NMS_KERNEL,
            nms_sigma=solo.NMS_SIGMA,
            update_threshold=solo.UPDATE_THRESH_TEST,
            nms_threshold=solo.NMS_THRESH_TEST,
            max_detections=cfg.TEST.DETECTIONS_PER_IMAGE,
        )

    def find(self, scores: Tensor) -> Candidates:
        """The candidates of one image by category alone.

        They are found on the host: which masks to make is decided there, and searching on a GPU
        would wait for it several times.

        Args:
            scores: (cells of all levels, C) after point NMS, on the CPU.
        """
        cells, classes = np.nonzero(scores.numpy() > self.score_threshold)
        # gathered by PyTorch, so that a traced graph contains the category branch
        found = scores[torch.from_numpy(cells), torch.from_numpy(classes)]
        if self.max_candidates and len(cells) > self.max_candidates:
            best = found.topk(self.max_candidates).indices.sort().values
            cells, classes, found = cells[best.numpy()], classes[best.numpy()], found[best]
        return Candidates(cells, classes, found)

    def rank(
        self,
        candidates: Candidates,
        soft_masks: MaskFunction,
        mask_size: tuple[int, int],
        device: torch.device,
        *,
        level_offsets: Sequence[int],
        strides: Sequence[int],
    ) -> ScoredMasks:
        """Score the candidates of one image by their masks and keep the best.

        A first pass makes the mask of every cell that has a candidate, for its area and maskness.
        If these are more masks than may be kept and exceed a chunk, they are not stored, and a
        second pass makes those of the best candidates again. So the memory does not depend on the
        number of candidates. Classes that share a cell share its mask.

        Args:
            candidates: result of ``find``.
            soft_masks: makes the masks of cells of a level.
            mask_size: height and width of these masks.
            device: that of the masks.
            level_offsets: first cell of each level, and the number of cells.
            strides: per level; a mask must have more pixels than this.
        """
        length = chunk_length(mask_size[0] * mask_size[1], device)
        chunks = partial(_masks_by_level, soft_masks, level_offsets, length)
        unique_cells, cell_of_pair = np.unique(candidates.cells, return_inverse=True)
        stored = len(unique_cells) <= max(length, self.topk_candidates)
        masks = torch.empty((len(unique_cells) if stored else 0, *mask_size), device=device)
        # each list starts with an empty tensor, so that it can be concatenated without candidates
        sized, maskness = [masks.new_zeros(0, dtype=torch.bool)], [masks.new_zeros(0)]
        start = 0
        for level, chunk in chunks(unique_cells):
            area, mean = score_masks(chunk, self.mask_threshold)
            sized.append(area > strides[level])
            maskness.append(mean)
            if stored:
                masks[start : start + len(chunk)] = chunk
                start += len(chunk)
        classes, cell_of = (
            upload(torch.from_numpy(x), device) for x in (candidates.classes, cell_of_pair)
        )
        scores = upload(candidates.scores, device) * torch.cat(maskness)[cell_of]
        large_enough = torch.cat(sized)[cell_of].nonzero()[:, 0]
        order = scores[large_enough].sort(descending=True, stable=True).indices
        best = large_enough[order[: self.topk_candidates]]

        if stored:
            return ScoredMasks(scores[best], classes[best], masks[cell_of[best]])
        best_cells, mask_of = np.unique(candidates.cells[best.cpu().numpy()], return_inverse=True)
        kept = masks.new_empty((len(best), *mask_size))
        start = 0
        for _, chunk in chunks(best_cells):
            (rows,) = np.nonzero((start <= mask_of) & (mask_of < start + len(chunk)))
            # with the indices as arrays, PyTorch copies them to the device
            kept[rows] = chunk[mask_of[rows] - start]
            start += len(chunk)
        return ScoredMasks(scores[best], classes[best], kept)

    def suppress(self, candidates: ScoredMasks) -> ScoredMasks:
        """NMS of masks and the final selection."""
        binary = candidates.masks > self.mask_threshold
        if self.nms_type == "matrix":
            scores = matrix_nms(
                binary,
                candidates.classes,
                candidates.scores,
                kernel=self.nms_kernel,
                sigma=self.nms_sigma,
                finite=self.nms_finite,
            )
            keep = scores >= self.update_threshold
        else:
            scores = candidates.scores
            keep = mask_nms(binary, candidates.classes, iou_threshold=self.nms_threshold)
        # select first, so that the masks are gathered only once
        order = scores.where(keep, -1).sort(descending=True, stable=True).indices
        order = order[: min(self.max_detections, int(keep.sum()))]
        return ScoredMasks(scores[order], candidates.classes[order], candidates.masks[order])


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


def _masks_by_level(
    soft_masks: MaskFunction, level_offsets: Sequence[int], length: int, cells: np.ndarray
) -> Iterator[tuple[int, Tensor]]:
    """The masks of cells in ascending order, in chunks of at most ``length``, with their level."""
    bounds = np.searchsorted(cells, level_offsets)
    for level, (start, stop) in enumerate(zip(bounds, bounds[1:])):
        for i in range(start, stop, length):
            chunk = cells[i : min(i + length, stop)]
            yield level, soft_masks(level, chunk - level_offsets[level])
