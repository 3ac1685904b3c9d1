"""Finding objects without a user: which points to decode and which masks to keep.

Points are (row, column) in pixels of the network's input without padding, which has size (H, W).
Soft masks (M, h, w) have the size of the feature map, which covers the padding too;
``EmbeddedImage.enlarge`` brings them to (M, H, W). Masks are chosen on the CPU, so that a GPU is
waited for once per batch of points.
"""

from dataclasses import dataclass

import cv2
import numpy as np
import torch
from torch import Tensor

from solo_d2.layers.masks import CHUNK_BYTES

from ..options import check_at_least, check_fractions
from .embedded import EmbeddedImage

# Smaller masks are not accepted.
_MIN_MASK_AREA = 10
# Pixels above this probability count for the score of a mask from a random point.
_FOREGROUND = 0.2
# Size of the masks decoded at once on the CPU; the fastest one measured.
_CPU_BATCH_BYTES = 512 * 1024


@dataclass(frozen=True)
class ProposalSelection:
    """Objects at the peaks of the proposal map, best first; defaults are the published code's."""

    # A pixel belongs to a mask where its probability exceeds this.
    mask_threshold: float = 0.4
    # A mask is dropped if this share of it or more is occupied by earlier masks.
    max_occupied: float = 0.4
    # Half the side, in pixels, of a window around the point outside of which a mask is 0; 0: off.
    cut_radius: int = 0
    # Maximum number of candidates.
    max_candidates: int = 500
    # Lowest probability of a thing class, and lowest proposal value, at a candidate.
    min_things_prob: float = 0.6
    min_value: float = 0.35
    # Side of the box blur of the proposal map, in pixels; up to 1: none.
    blur: int = 5
    # See ``find_peaks``.
    eps: float = 0.003
    step: float = 0.025

    def __post_init__(self) -> None:
        check_fractions(
            max_occupied=self.max_occupied,
            min_things_prob=self.min_things_prob,
            min_value=self.min_value,
        )
        check_at_least(
            0, cut_radius=self.cut_radius, max_candidates=self.max_candidates, blur=self.blur
        )
        if self.step <= 0:
            raise ValueError(f"step must be positive, not {self.step}")

    def __call__(self, proposals: Tensor, things: Tensor, image: EmbeddedImage) -> Tensor:
        """
        Args:
            proposals: (H, W) squared probabilities of the proposal head.
            things: (T, H, W) probabilities of the thing classes.
            image: decodes the points.

        Returns:
            (M, h, w) soft masks, in the order in which they were accepted.
        """
        occupied = torch.zeros(proposals.shape, dtype=torch.bool)
        candidates = self.candidates(self.search_map(proposals, things, occupied))
        # A larger batch decodes more masks that turn out to be occupied, which costs time on the
        # CPU; a smaller one waits more often for a GPU.
        budget = _CPU_BATCH_BYTES if proposals.device.type == "cpu" else CHUNK_BYTES
        batch_size = max(1, budget // (4 * proposals.numel()))
        return self.select(candidates, image, occupied, batch_size=batch_size)

    def search_map(self, proposals: Tensor, things: Tensor, occupied: Tensor) -> np.ndarray:
        """(H, W) float32 that is searched for candidates.

        Args:
            proposals, things: see ``__call__``.
            occupied: (H, W) bool on the CPU, pixels without candidates.
        """
        likely = (things * ~occupied.to(things.device)).amax(dim=0) >= self.min_things_prob
        values = torch.where(likely, proposals, 0).float().cpu().numpy()
        return cv2.blur(values, (self.blur, self.blur)) if self.blur > 1 else values

    def candidates(self, values: np.ndarray) -> np.ndarray:
        """(K, 2) rows and columns, best first, in a result of ``search_map``."""
        return find_peaks(
            values,
            min_value=self.min_value,
            eps=self.eps,
            step=self.step,
            max_peaks=self.max_candidates,
        )[0]

    def select(
        self,
        candidates: np.ndarray,
        image: EmbeddedImage,
        occupied: Tensor,
        *,
        batch_size: int,
    ) -> Tensor:
        """Masks of candidates, in order, that do not lie on earlier ones.

        A candidate is skipped if its pixel is already occupied. Masks are decoded in batches before
        the decisions; the result is the same as when each candidate is decided on before the next
        is decoded.

        Args:
            candidates: (K, 2) rows and columns.
            image: decodes the points.
            occupied: (H, W) bool on the CPU, pixels that are occupied from the start.
            batch_size: number of candidates decoded at once.

        Returns:
            (M, h, w) soft masks.
        """
        taken = occupied.numpy().copy()
        free = candidates
        accepted: list[Tensor] = []
        while True:
            free = free[~taken[free[:, 0], free[:, 1]]]
            batch, free = free[:batch_size], free[batch_size:]
            if len(batch) == 0 and accepted:
                return torch.cat(accepted)
            points = torch.from_numpy(batch).float()
            masks = image.soft_masks(points)
            if self.cut_radius > 0:
                masks = _cut(masks, points, self.cut_radius, image.stride)
            binary = (image.enlarge(masks) > self.mask_threshold).cpu().numpy()
            areas = np.count_nonzero(binary, axis=(1, 2))
            kept = []
            for number, ((row, column), mask, area) in enumerate(zip(batch, binary, areas)):
                if taken[row, column] or area < _MIN_MASK_AREA:
                    continue
                if np.count_nonzero(mask & taken) / area < self.max_occupied:
                    taken |= mask
                    kept.append(number)
            accepted.append(masks[kept])


@dataclass(frozen=True)
class RandomSelection:
    """Objects at random points in regions without an object; needs no proposal head."""

    # A pixel belongs to a mask where its probability exceeds this.
    mask_threshold: float = 0.5
    # A mask is dropped if a smaller share of it is free.
    min_free: float = 0.6
    # Pixels where no thing class reaches this probability are background.
    min_things_prob: float = 0.5
    # Each round decodes masks at num_candidates points, of which at most the most certain is kept.
    num_rounds: int = 40
    num_candidates: int = 5

    def __post_init__(self) -> None:
        check_fractions(min_free=self.min_free, min_things_prob=self.min_things_prob)
        check_at_least(1, num_rounds=self.num_rounds, num_candidates=self.num_candidates)

    def __call__(
        self, things: Tensor, image: EmbeddedImage, generator: torch.Generator | None = None
    ) -> Tensor:
        """
        Args:
            things: (T, H, W) probabilities of the thing classes.
            image: decodes the points.
            generator: a CPU generator.

        Returns:
            (M, H, W) soft masks: 0 up to the threshold, on earlier masks, and on background.
        """
        free = (things.amax(dim=0) >= self.min_things_prob).cpu().numpy()
        accepted = [things.new_zeros((0, *free.shape))]
        for _ in range(self.num_rounds):
            pixels = torch.from_numpy(np.argwhere(free))
            if len(pixels) == 0:
                break
            chosen = torch.randperm(len(pixels), generator=generator)[: self.num_candidates]
            masks = image.enlarge(image.soft_masks(pixels[chosen].float()))
            mask = masks.index_select(0, _certainty(masks).argmax()[None])
            binary = (mask > self.mask_threshold)[0].cpu().numpy()
            area = np.count_nonzero(binary)
            # the published code divides by the area even if it is 0
            if area == 0 or np.count_nonzero(binary & free) / area < self.min_free:
                continue
            accepted.append(mask * torch.from_numpy(binary & free).to(mask.device))
            free &= ~binary
        return torch.cat(accepted)


def find_peaks(
    values: np.ndarray,
    *,
    min_value: float,
    eps: float = 0.003,
    step: float = 0.025,
    max_peaks: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Local maxima, best first, without those on the slope of a better one.

    Pixels are visited level by level from the top, and in raster order within a level. A pixel that
    none of its eight neighbors exceeds becomes a peak and floods its surroundings: the flood moves
    from a pixel to each neighbor that is not higher by ``eps`` or more. A flooded pixel cannot
    become a peak.

    Args:
        values: (H, W) float32 in [0, 1].
        min_value: lower limit on a peak and on each of its neighbors.
        eps: a flood climbs less than this in one step.
        step: distance between levels.
        max_peaks: stop after this many.

    Returns:
        (K, 2) int64 rows and columns, and (H, W) int64 the index of the peak that flooded each
        pixel, -1 where none did.
    """
    h, w = values.shape
    # a border that is never higher, never too low and never flooded
    padded = np.full((h + 2, w + 2), -np.inf, dtype=np.float32)
    padded[1:-1, 1:-1] = values
    low = np.where(np.isneginf(padded), np.inf, padded)
    shifts = [(y, x) for y in range(3) for x in range(3) if (y, x) != (1, 1)]
    is_peak = np.ones((h, w), dtype=bool)
    for y, x in shifts:
        is_peak &= padded[y : y + h, x : x + w] <= values
        is_peak &= low[y : y + h, x : x + w] >= np.float32(min_value)
    rows, columns = is_peak.nonzero()
    order = _order_by_level(values[rows, columns], min_value, step)

    labels = np.full((h + 2, w + 2), -2, dtype=np.int64)
    labels[1:-1, 1:-1] = -1
    flat_labels, flat_values = labels.reshape(-1), padded.reshape(-1)
    offsets = np.array([(y - 1) * (w + 2) + x - 1 for y, x in shifts])
    peaks: list[tuple[int, int]] = []
    for row, column in zip(rows[order].tolist(), columns[order].tolist()):
        if labels[row + 1, column + 1] != -1:
            continue
        if max_peaks is not None and len(peaks) >= max_peaks:
            break
        front = np.array([(row + 1) * (w + 2) + column + 1])
        flat_labels[front] = len(peaks)
        while len(front):
            around = front[:, None] + offsets
            climb = flat_values[front, None] + np.float32(eps) > flat_values[around]
            front = np.unique(around[climb & (flat_labels[around] == -1)])
            flat_labels[front] = len(peaks)
        peaks.append((row, column))
    found = np.array(peaks, dtype=np.int64).reshape(-1, 2)
    return found, labels[1:-1, 1:-1].copy()


def _order_by_level(heights: np.ndarray, min_value: float, step: float) -> np.ndarray:
    """Indices of the peaks that are not below all levels, level by level from the top."""
    levels = []
    level = np.float32(0.99)
    while level > np.float32(min_value):
        level -= np.float32(step)  # levels are sums in single precision
        levels.append(level)
    # for each peak, the first level not above it
    reached = np.searchsorted(-np.array(levels, dtype=np.float32), -heights)
    order = np.argsort(reached, kind="stable")
    return order[reached[order] < len(levels)]


def _cut(masks: Tensor, points: Tensor, radius: int, stride: int) -> Tensor:
    """Set (M, h, w) masks to 0 outside of a square around their points."""
    inside = []
    for length, center in zip(masks.shape[1:], points.to(masks.device).unbind(1)):
        offset = torch.arange(length, device=masks.device) * stride - center[:, None]
        inside.append((-radius <= offset) & (offset < radius))
    return masks * (inside[0][:, :, None] & inside[1][:, None, :])


def _certainty(masks: Tensor) -> Tensor:
    """(M,) mean probability over the likely pixels of each mask."""
    inside = masks > _FOREGROUND
    return (masks * inside).sum(dim=(1, 2)) / inside.sum(dim=(1, 2)).clamp(min=1)
