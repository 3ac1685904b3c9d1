"""From the maps of AdaptIS to instances and to a panoptic segmentation (its section 3.5).

Points are (row, column) in pixels of the network's input without padding.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor

from solo_d2.layers.resample import resize

# A smaller mask is not accepted.
_MIN_MASK_AREA = 10
# Pixels that count for the score of a mask that was made at a random point.
_FOREGROUND = 0.2

# Points (n, 2) float32 -> soft masks (n, H, W)
MaskFunction = Callable[[Tensor], Tensor]


def proposal_map(
    proposals: Tensor,
    things: Tensor,
    occupied: Tensor,
    *,
    min_things_prob: float = 0.6,
    blur: int = 5,
) -> np.ndarray:
    """What candidates are searched in.

    Args:
        proposals: (H, W) squared probabilities of the proposal head.
        things: (T, H, W) probabilities of the thing classes.
        occupied: (H, W) bool, pixels to leave out.
        min_things_prob: lowest probability of a thing class at a candidate.
        blur: side of a box blur; up to 1: none.

    Returns:
        (H, W) float32.
    """
    likely = (things * ~occupied).amax(dim=0) >= min_things_prob
    values = torch.where(likely, proposals, 0).float().cpu().numpy()
    return cv2.blur(values, (blur, blur)) if blur > 1 else values


def find_peaks(
    values: np.ndarray,
    *,
    min_value: float,
    eps: float = 0.003,
    step: float = 0.025,
    flood: bool = True,
    max_peaks: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Local maxima, best first, but for those on the slope of a better one.

    In falling levels and in raster order within a level, each pixel that no neighbor exceeds
    becomes a peak, and floods its surroundings: from a pixel to each neighbor that is not higher
    by ``eps`` or more. Flooded pixels are no peaks any more. Neighbors are the eight around.

    Args:
        values: (H, W) float32 in [0, 1].
        min_value: of a peak and of each of its neighbors.
        eps: how far a flood climbs in one step.
        step: distance of the levels.
        flood: False keeps every local maximum, faster.
        max_peaks: stop after so many.

    Returns:
        (K, 2) int64 rows and columns, and (H, W) int64 the index of the peak that flooded each
        pixel, -1 where none did (and everywhere but for peaks without ``flood``).
    """
    h, w = values.shape
    # a border that is no neighbor: never higher, never too low, never flooded
    padded = np.full((h + 2, w + 2), -np.inf, dtype=np.float32)
    padded[1:-1, 1:-1] = values
    low = np.where(np.isneginf(padded), np.inf, padded)
    shifts = [(y, x) for y in range(3) for x in range(3) if (y, x) != (1, 1)]
    is_peak = np.ones((h, w), dtype=bool)
    for y, x in shifts:
        is_peak &= padded[y : y + h, x : x + w] <= values
        is_peak &= low[y : y + h, x : x + w] >= np.float32(min_value)
    rows, columns = is_peak.nonzero()
    heights = values[rows, columns]
    # the number of the level that reaches each peak; levels are single-precision sums
    levels = []
    level = np.float32(0.99)
    while level > np.float32(min_value):
        level -= np.float32(step)
        levels.append(level)
    reached = np.searchsorted(-np.array(levels, dtype=np.float32), -heights)
    order = np.argsort(reached, kind="stable")
    order = order[reached[order] < len(levels)]

    labels = np.full((h + 2, w + 2), -2, dtype=np.int64)
    labels[1:-1, 1:-1] = -1
    flat_labels, flat_values = labels.reshape(-1), padded.reshape(-1)
    offsets = np.array([(y - 1) * (w + 2) + x - 1 for y, x in shifts])
    visited = np.empty(flat_labels.shape, dtype=np.int64)
    peaks: list[tuple[int, int]] = []
    for row, column in zip(rows[order].tolist(), columns[order].tolist()):
        if labels[row + 1, column + 1] != -1:
            continue
        if max_peaks is not None and len(peaks) >= max_peaks:
            break
        labels[row + 1, column + 1] = len(peaks)
        if flood:
            front = np.array([(row + 1) * (w + 2) + column + 1])
            while len(front):
                around = front[:, None] + offsets
                climb = flat_values[front, None] + np.float32(eps) > flat_values[around]
                front = around[climb & (flat_labels[around] == -1)]
                flat_labels[front] = len(peaks)
                # each pixel once: the last of equal writes stays
                index = np.arange(len(front))
                visited[front] = index
                front = front[visited[front] == index]
        peaks.append((row, column))
    found = np.array(peaks, dtype=np.int64).reshape(-1, 2)
    return found, labels[1:-1, 1:-1].copy()


def select_greedily(
    candidates: np.ndarray,
    predict: MaskFunction,
    occupied: Tensor,
    *,
    mask_threshold: float = 0.4,
    max_occupied: float = 0.4,
    cut_radius: int = -1,
    max_candidates: int = 500,
) -> Iterator[Tensor]:
    """Masks of candidates, in their order, that do not lie on earlier ones.

    Args:
        candidates: (K, 2) rows and columns.
        predict: makes masks of points; only candidates that are still free are asked for.
        occupied: (H, W) bool, pixels that are taken from the start.
        mask_threshold: a pixel belongs to a mask where its probability exceeds this.
        max_occupied: a mask is dropped if this share of it or more is taken.
        cut_radius: half side of a window around the point, outside of which a mask is 0; off if
            not positive.
        max_candidates: candidates that are looked at.

    Yields:
        (H, W) soft masks.
    """
    occupied = occupied.clone()
    for row, column in candidates[:max_candidates].tolist():
        if occupied[row, column]:
            continue
        mask = predict(torch.tensor([[row, column]], dtype=torch.float32))[0]
        if cut_radius > 0:
            window = _window(row, cut_radius), _window(column, cut_radius)
            cut = torch.zeros_like(mask)
            cut[window] = mask[window]
            mask = cut
        binary = mask > mask_threshold
        area, taken = torch.stack([binary.sum(), (binary & occupied).sum()]).tolist()
        if area < _MIN_MASK_AREA or taken / area >= max_occupied:
            continue
        occupied |= binary
        yield mask


def _window(center: int, radius: int) -> slice:
    return slice(max(0, center - radius), center + radius)


def select_at_random(
    predict: MaskFunction,
    things: Tensor,
    *,
    mask_threshold: float = 0.5,
    min_free: float = 0.6,
    min_things_prob: float = 0.5,
    num_iters: int = 40,
    num_candidates: int = 5,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """Masks at random points where nothing is yet; needs no proposal head.

    Args:
        predict: makes masks of points.
        things: (T, H, W) probabilities of the thing classes.
        mask_threshold: a pixel belongs to a mask where its probability exceeds this.
        min_free: a mask is dropped if less than this share of it is free.
        min_things_prob: where no thing class reaches this, there is background.
        num_iters: rounds; each accepts one mask at most.
        num_candidates: points in a round, of which the most certain mask counts.
        generator: on the CPU.

    Yields:
        (H, W) soft masks, 0 up to the threshold and where the earlier ones or background are.
    """
    free = things.amax(dim=0) >= min_things_prob
    for _ in range(num_iters):
        pixels = free.nonzero()
        if len(pixels) == 0:
            return
        chosen = torch.randperm(len(pixels), generator=generator)[:num_candidates]
        masks = predict(pixels[chosen.to(pixels.device)].float())
        mask = masks[_certainty(masks).argmax()]
        binary = mask > mask_threshold
        area, unknown = torch.stack([binary.sum(), (binary & free).sum()]).tolist()
        # the published code divides by the area without a look at it
        if area == 0 or unknown / area < min_free:
            continue
        yield mask * (binary & free)
        free = free & ~binary


def _certainty(masks: Tensor) -> Tensor:
    """(n,) mean probability over the likely pixels of each mask."""
    inside = masks > _FOREGROUND
    return (masks * inside).sum(dim=(1, 2)) / inside.sum(dim=(1, 2)).clamp(min=1)


class Segmentation(NamedTuple):
    """K instances of one image at output size, disjoint."""

    ids: Tensor  # (H, W) int32: 1..K, 0 for none
    classes: Tensor  # (K,) int64 thing classes
    scores: Tensor  # (K,) float32 in [0, 1]
    semantic: Tensor  # (H, W) int64: stuff, then things; -1 unknown
    background: Tensor  # (H, W) float32, what the instances compete with
    masks: list[Tensor]  # K (H, W) bool before the competition, if they were asked for


def assemble(
    masks: Iterator[Tensor],
    semantic_probs: Tensor,
    *,
    num_stuff: int,
    ignored: Tensor | None = None,
    mask_threshold: float = 0.4,
    min_things_prob: float = 0.0,
    min_stuff_prob: float = 0.0,
    stuff_prob_mult: float = 1.0,
    class_vote: str = "mean",
    keep_masks: bool = False,
) -> Segmentation:
    """Let soft masks and the background compete for every pixel.

    Masks are resized and entered one by one as they come: none is kept.

    Args:
        masks: (h, w) each, soft, in the order in which they were accepted; any size.
        semantic_probs: (K, H, W) at output size, stuff before things.
        num_stuff: number of stuff classes.
        ignored: (H, W) bool: no semantic label there.
        mask_threshold: the class of a mask and its score are taken where it exceeds this.
        min_things_prob: pixels whose best mask is lower belong to no instance.
        min_stuff_prob: pixels whose best stuff class is lower have no semantic label.
        stuff_prob_mult: factor on the probability of the background, 1 - things.
        class_vote: "mean" of the class probabilities over the mask, or "majority" of its pixels.
        keep_masks: return the binary masks, which may overlap.
    """
    stuff, things = semantic_probs[:num_stuff], semantic_probs[num_stuff:]
    size = (things.shape[-2], things.shape[-1])
    background = stuff_prob_mult * (1 - things.sum(dim=0))
    best = background.clone()
    ids = torch.zeros(size, dtype=torch.int32, device=things.device)
    votes, kept = [], []
    for number, mask in enumerate(masks, start=1):
        mask = resize(mask[None, None], size)[0, 0]
        # strictly: the first of equal ones wins
        wins = mask > best
        best = torch.where(wins, mask, best)
        ids.masked_fill_(wins, number)
        votes.append(vote(mask[None], things, mask_threshold=mask_threshold, class_vote=class_vote))
        if keep_masks:
            kept.append(mask > mask_threshold)
    ids.masked_fill_(best < min_things_prob, 0)
    semantic = semantic_probs.argmax(dim=0)
    unknown = stuff.amax(dim=0) < min_stuff_prob
    if ignored is not None:
        unknown |= ignored
    empty = torch.zeros(0, device=things.device)
    return Segmentation(
        ids,
        torch.cat([v[0] for v in votes]) if votes else empty.long(),
        torch.cat([v[1] for v in votes]) if votes else empty,
        semantic.masked_fill(unknown, -1),
        background,
        kept,
    )


def vote(
    masks: Tensor, things: Tensor, *, mask_threshold: float = 0.4, class_vote: str = "mean"
) -> tuple[Tensor, Tensor]:
    """Class and score of soft masks.

    The score is ours, there is none in the published code: the mean probability inside the mask
    times that of its class there; 0 for an empty mask.

    Args:
        masks: (n, H, W) soft.
        things: (T, H, W) probabilities of the thing classes.
        mask_threshold: what is inside.
        class_vote: see ``assemble``.

    Returns:
        (n,) int64 classes and (n,) float32 scores.
    """
    inside = (masks > mask_threshold).flatten(1).float()
    area = inside.sum(dim=1).clamp(min=1)
    with torch.autocast(masks.device.type, enabled=False):
        means = inside @ things.flatten(1).float().T / area[:, None]
        ballots = means
        if class_vote == "majority":
            winners = torch.zeros_like(things).scatter_(0, things.argmax(dim=0)[None], 1)
            ballots = inside @ winners.flatten(1).float().T
    classes = ballots.argmax(dim=1)
    certainty = (masks.flatten(1).float() * inside).sum(dim=1) / area
    return classes, certainty * means.gather(1, classes[:, None])[:, 0]


def panoptic_segments(
    segmentation: Segmentation, *, num_stuff: int, min_area: int = 1
) -> tuple[Tensor, list[dict[str, Any]]]:
    """Stuff segments, then instances, in Detectron2's format.

    A pixel whose semantic label is a thing but that belongs to no instance is void.

    Args:
        segmentation: of one image.
        num_stuff: number of stuff classes.
        min_area: smaller segments are void.

    Returns:
        (H, W) int32 segment ids, 0 for void, and per segment its "id", "isthing", "category_id"
        (the stuff class, or the thing class counted from 0), "area", and for things "score".
    """
    ids, semantic = segmentation.ids, segmentation.semantic
    is_stuff = (ids == 0) & (semantic >= 0) & (semantic < num_stuff)
    # 0 void, then stuff classes, then instances
    number = torch.where(is_stuff, semantic + 1, 0)
    number = torch.where(ids > 0, ids.long() + num_stuff, number)
    areas = number.flatten().bincount(minlength=1 + num_stuff + len(segmentation.scores))
    kept = areas >= max(1, min_area)
    kept[0] = False
    lookup = torch.where(kept, kept.cumsum(0), 0).int()
    segments: list[dict[str, Any]] = []
    classes, scores = segmentation.classes.tolist(), segmentation.scores.tolist()
    for index, area in enumerate(areas.tolist()):
        if index == 0 or area < max(1, min_area):
            continue
        thing = index - 1 - num_stuff
        segment = {"id": len(segments) + 1, "isthing": thing >= 0, "area": area}
        if thing >= 0:
            segment |= {"category_id": classes[thing], "score": scores[thing]}
        else:
            segment["category_id"] = index - 1
        segments.append(segment)
    return lookup[number], segments
