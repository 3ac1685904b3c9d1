"""Placing the labels of a picture, and rendering their text."""

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# A label may cover at most this share of an object, and _OWN_FACTOR times as much of its own.
_MAX_COVERED = 0.05
_OWN_FACTOR = 4
# All labels together cover at most this much of the image.
_MAX_LABELED = 0.2

Box = tuple[int, int, int, int]  # left, top, width, height


def place_labels(
    owner: np.ndarray, boxes: Sequence[Box], labels: Sequence[np.ndarray]
) -> list[tuple[int, int] | None]:
    """Left and top of each label; None for one without a free place.

    A label lies inside the image, overlaps no other label and covers little of any object.

    Args:
        owner: (H, W) int, which object is visible at a pixel: 0 none, i + 1 object i.
        boxes: N bounding boxes, the most important first.
        labels: N arrays, each with the height and width of a label.
    """
    owner = owner.copy()
    label = len(boxes) + 1  # stands for any label in ``owner``
    # Maximum number of pixels of each object that a label may cover; more for its own object.
    limits = _MAX_COVERED * np.bincount(owner.ravel(), minlength=label + 1)
    limits[0] = owner.size
    budget = _MAX_LABELED * owner.size
    places: list[tuple[int, int] | None] = []
    for number, (box, letters) in enumerate(zip(boxes, labels), 1):
        place = None
        if letters.size <= budget:
            own_limits = limits.copy()
            own_limits[number] *= _OWN_FACTOR
            candidates = _candidates(box, *letters.shape, columns=owner.shape[1])
            place = _best_place(owner, number, letters.shape, own_limits, candidates)
        if place is not None:
            x, y = place
            owner[y : y + letters.shape[0], x : x + letters.shape[1]] = label
            budget -= letters.size
        places.append(place)
    return places


def _best_place(
    owner: np.ndarray,
    number: int,
    size: Sequence[int],
    limits: np.ndarray,
    candidates: Iterable[tuple[int, int]],
) -> tuple[int, int] | None:
    """The first candidate within ``limits`` that covers no other object; else the best one."""
    best, least = None, np.inf
    for x, y in candidates:
        part = owner[y : y + size[0], x : x + size[1]]
        if min(x, y) < 0 or part.shape != size:
            continue
        counts = np.bincount(part.ravel(), minlength=len(limits))
        others = part.size - counts[0] - counts[number]
        if others < least and (counts <= limits).all():
            best, least = (x, y), others
            if others == 0:
                break
    return best


def _candidates(box: Box, height: int, width: int, *, columns: int) -> Iterator[tuple[int, int]]:
    """Places for a label, the best one first: above, below, beside and within the box."""
    left, top = box[:2]
    right, bottom = left + box[2], top + box[3]
    aligned = [max(0, min(x, columns - width)) for x in (left, right - width)]
    middle = (top + bottom - height) // 2
    yield from ((x, y) for y in (top - height, bottom) for x in aligned)
    yield from ((x, middle) for x in (right, left - width, (left + right - width) // 2))
    yield from ((x, y) for y in (top + 2, bottom - height - 2) for x in aligned)


@lru_cache(maxsize=4096)
def letters_mask(text: str, font_size: int) -> np.ndarray:
    """(height, width) uint8: opacity of the text's letters, with some space around them."""
    face = font(font_size)
    ascent, descent = face.getmetrics()
    space = max(2, font_size // 5)
    size = (int(face.getlength(text)) + 1 + 2 * space, ascent + descent)
    picture = Image.new("L", size)
    ImageDraw.Draw(picture).text((space, 0), text, fill=255, font=face)
    return np.asarray(picture)


@lru_cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """A font with more than OpenCV's ASCII; it comes with matplotlib, which Detectron2 needs."""
    spec = find_spec("matplotlib")
    assert spec is not None and spec.origin is not None
    path = Path(spec.origin).parent / "mpl-data/fonts/ttf/DejaVuSans.ttf"
    return ImageFont.truetype(str(path), size)
