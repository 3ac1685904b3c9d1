"""Reading one annotation of a COCO json: values of the types that tools write, masks, boxes."""

import math
import re
from typing import Any

import numpy as np
import pycocotools.mask as mask_util

# Drawing a polygon takes time and memory proportional to its perimeter, also outside the image.
_LARGEST_COORDINATE = 1e6
# A box is replaced if its IoU with its mask's box is lower and a side is off by more pixels.
_BOX_IOU, _BOX_TOLERANCE = 0.5, 2.0


# What the reader does with a faulty entry: it raises an error, skips it, or corrects it.
REFUSED, SKIPPED, REPAIRED = "refused", "skipped", "repaired"


class Fault(ValueError):
    """An annotation that is not used."""

    def __init__(self, what: str, detail: str = "", *, effect: str = REFUSED):
        """
        Args:
            what: the kind of fault, in the plural.
            detail: the value in question.
            effect: REFUSED, or SKIPPED.
        """
        super().__init__(what)
        self.what, self.detail, self.effect = what, detail, effect


def show(value: Any) -> str:
    """A value as in Python, so that '1' differs from 1, shortened to a readable length."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


# --- values; None if a value cannot be converted without loss


def number(value: Any) -> int | float | None:
    """A finite number, also if it is written as text."""
    if isinstance(value, str) and re.fullmatch(r"\s*[-+]?[0-9.]{1,40}(e[-+]?[0-9]+)?\s*", value):
        try:
            value = float(value)
        except ValueError:
            return None
    if type(value) not in (int, float) or not abs(value) < 1e300:  # NaN too
        return None
    return value


def whole(value: Any) -> int | None:
    found = number(value)
    return None if found is None or found != math.floor(found) else int(found)


def identity(value: Any) -> int | str | None:
    """An id: 3.0 and "3" are read as 3; "03" stays text."""
    if isinstance(value, str):
        return int(value) if re.fullmatch(r"0|-?[1-9][0-9]{0,15}", value) else value or None
    return whole(value)


def flag(value: Any) -> int | None:
    """0 or 1 from "iscrowd" as various tools write it; some write -1 for unknown."""
    if isinstance(value, str):
        value = {"false": 0, "true": 1, "": 0}.get(value.strip().lower(), value)
    found = int(value) if isinstance(value, bool) else whole(value)
    return None if found is None else {-1: 0, 0: 0, 1: 1}.get(found)


def mask_of(value: Any, height: int, width: int, repairs: list[str]) -> Any:
    """The segmentation as polygons or an RLE; changes are added to ``repairs``.

    Raises:
        Fault: there is none, or it has no one meaning.
    """
    if not value:
        raise Fault("annotations with no segmentation", effect=SKIPPED)
    if isinstance(value, dict):
        return _rle(value, height, width, repairs)
    polygons = _polygons(value, repairs)
    good = [p for p in polygons if len(p) >= 6 and len(p) % 2 == 0]
    if not good:
        raise Fault("annotations with a degenerate polygon", effect=SKIPPED)
    if not mask_util.area(to_rle(good, height, width)):
        raise Fault("annotations with polygons that cover no pixel", effect=SKIPPED)
    if len(good) < len(polygons):
        repairs.append("masks with a degenerate polygon, which is removed")
    return good


def _polygons(value: Any, repairs: list[str]) -> list[list[float]]:
    """[[x, y, x, y, ...], ...] from that form, from points in pairs, or from a single polygon."""
    wrong = Fault("annotations whose segmentation is neither polygons nor an RLE", show(value))
    if not isinstance(value, list):
        raise wrong
    if not any(isinstance(x, (list, dict)) for x in value):  # the numbers of one polygon
        value = [value]
        repairs.append("polygons without an enclosing list, which is added")
    elif len(value) >= 3 and _are_points(value):  # of one polygon
        value = [value]
    result = []
    for polygon in value:
        if not isinstance(polygon, list):
            raise wrong
        if polygon and all(isinstance(point, list) and len(point) == 2 for point in polygon):
            polygon = [c for point in polygon for c in point]
            repairs.append("polygons whose points are pairs, flattened")
        numbers = polygon
        if not {*map(type, polygon)} <= {int, float}:
            numbers = [number(c) for c in polygon]
            repairs.append("polygons whose coordinates are texts, converted")
        for c, found in zip(polygon, numbers):
            if found is None or not abs(found) <= _LARGEST_COORDINATE:  # NaN too
                what = "polygons whose coordinates are not numbers of pixels"
                raise Fault(what, f"coordinate {show(c)}")
        result.append(numbers)
    return result


def _are_points(value: list) -> bool:
    pairs = all(isinstance(x, list) and len(x) == 2 for x in value)
    return pairs and not any(isinstance(c, list) for x in value for c in x)


def _rle(value: dict, height: int, width: int, repairs: list[str]) -> dict:
    size, counts = value.get("size"), value.get("counts")
    if not isinstance(size, list) or not isinstance(counts, (list, str)):
        raise Fault("annotations whose segmentation is neither polygons nor an RLE", show(value))
    if [whole(side) for side in size] != [height, width]:
        what = "masks (RLE) with another size than their image"
        raise Fault(what, f"size {show(size)}, image [{height}, {width}]")
    runs = [whole(c) for c in counts] if isinstance(counts, list) else decompress(counts)
    # pycocotools fills the missing part of a truncated RLE with uninitialized memory
    numbers = [run for run in runs if run is not None and run >= 0]
    if len(numbers) < len(runs) or sum(numbers) != height * width:
        raise Fault("masks (RLE) whose runs (counts) do not add up to the image")
    if not sum(numbers[1::2]):
        raise Fault("annotations with an empty mask", effect=SKIPPED)
    integers = isinstance(counts, str) or {*map(type, counts)} == {int}
    if not integers or {*map(type, size)} != {int}:
        repairs.append("masks (RLE) whose numbers are not integers, converted")
        counts = counts if isinstance(counts, str) else numbers
    return value | {"size": [height, width], "counts": counts}


def decompress(counts: str) -> list[int | None]:
    """The runs of a compressed RLE: five bits per character; from the fourth on, differences.

    [None] if the text is not a compressed RLE.
    """
    bits = np.frombuffer(counts.encode("utf-8", "surrogatepass"), np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero(bits & 32 == 0)  # the others have more to come
    if not len(ends) or ends[-1] != len(bits) - 1 or bits.min() < 0 or bits.max() > 63:
        return [None]
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > 8:  # more bits than any run needs
        return [None]
    shifts = 5 * (np.arange(len(bits)) - np.repeat(starts, lengths))
    runs = np.add.reduceat((bits & 31) << shifts, starts)
    runs -= np.where(bits[ends] & 16, 1 << (5 * lengths), 0)  # the sign
    for parity in (1, 2):
        runs[parity::2] = runs[parity::2].cumsum()
    return runs.tolist()


def box_of(
    value: Any, mask_box: list[float] | None, height: int, width: int, repairs: list[str]
) -> list[float]:
    """[x, y, width, height]: as stated, or from the mask.

    Raises:
        Fault: there is neither.
    """
    box = _box_in_image(value, height, width)
    if box is None:
        kind = "that are not [x, y, width, height] inside the image"
        if mask_box is None:
            raise Fault(f"annotations with no mask, and with boxes {kind}", effect=SKIPPED)
        kind = "missing" if value is None else kind
        repairs.append(f"boxes {kind}, taken from the masks")
        return mask_box
    if mask_box is None:
        x, y, w, h = box
        left, top = max(x, 0), max(y, 0)
        clipped = [left, top, min(x + w, width) - left, min(y + h, height) - top]
        if np.abs(np.subtract(clipped, box)).max() > 1e-3:
            repairs.append("boxes that extend beyond the image, clipped")
            return clipped
    elif _are_unlike(box, mask_box):
        repairs.append("boxes unlike their masks (corners or fractions?), taken from the masks")
        return mask_box
    elif any(isinstance(side, str) for side in value):
        repairs.append("boxes whose numbers are texts, converted")
    return box


def box_of_mask(segmentation: Any, rle: dict) -> list[float]:
    """[x, y, width, height] around the vertices of polygons, as in COCO, or an RLE's pixels."""
    if isinstance(segmentation, list):
        height, width = rle["size"]
        corners = np.concatenate([np.asarray(p, dtype=float).reshape(-1, 2) for p in segmentation])
        low, high = np.clip([corners.min(axis=0), corners.max(axis=0)], 0, [width, height])
        if (high > low).all():
            return [*low.tolist(), *(high - low).tolist()]
    return mask_util.toBbox(rle).tolist()


def _box_in_image(value: Any, height: int, width: int) -> list[float] | None:
    """Four numbers of a box with an area inside the image, else None."""
    if not isinstance(value, list) or len(value) != 4:
        return None
    box = [n for n in map(number, value) if n is not None]
    if len(box) < 4:
        return None
    x, y, w, h = box
    has_area = w > 0 and h > 0 and x < width and y < height and x + w > 0 and y + h > 0
    return box if has_area else None


def _are_unlike(box: list[float], other: list[float]) -> bool:
    a, b = np.array(box, dtype=float), np.array(other, dtype=float)
    iou = mask_util.iou(a[None], b[None], [0])[0, 0]
    a[2:] += a[:2]
    b[2:] += b[:2]
    return bool(iou < _BOX_IOU and np.abs(a - b).max() > _BOX_TOLERANCE)


def to_rle(segmentation: Any, height: int, width: int) -> dict:
    """Compressed RLE of a polygon list or an RLE."""
    if isinstance(segmentation, list):
        return mask_util.merge(mask_util.frPyObjects(segmentation, height, width))
    if isinstance(segmentation["counts"], list):
        return mask_util.frPyObjects(segmentation, height, width)
    return segmentation
