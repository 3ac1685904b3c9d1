"""Masks for the page: images are embedded once, masks travel as COCO's uncompressed runs."""

import dataclasses
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import cv2
import numpy as np
import pycocotools.mask as mask_util
import torch

from solo_d2.errors import UserError
from solo_d2.images import as_rgb
from solo_d2.modeling import AdaptISPredictor
from solo_d2.modeling.adaptis.predictor import merge_masks
from solo_d2.predictor import Predictor
from solo_d2.tools.click import most_interior_pixel

# Larger images are reduced: networks see them smaller still, and a click would take seconds.
_LARGEST_SIDE = 1280
# What the automatic mode finds is left out below this score, as in ``Result.draw``, and if known
# objects cover more than this part of it.
_MIN_SCORE = 0.3
_MAX_KNOWN = 0.5


class _Embedded(NamedTuple):
    points: AdaptISPredictor  # its image is set
    size: tuple[int, int]  # height and width
    small: tuple[int, int]  # those of the image that ``points`` knows
    bytes: int


class Segmenter:
    """Finds objects in image files. May be called from several threads; they wait for each other.

    An object is a dict: "class", "score", "area" in pixels, "box" (x, y, width, height), and
    "counts", the runs of its mask in COCO's order.
    """

    def __init__(self, predictor: Predictor, *, cache_bytes: int = 512 * 1024**2):
        """
        Args:
            predictor: of a model that takes points.
            cache_bytes: embedded images are kept up to this size, and at least one of them.

        Raises:
            UserError: the model takes no points.
        """
        if not predictor.takes_points:
            raise UserError(f"the page needs AdaptIS, not {type(predictor.model).__name__}")
        self.names = predictor.names
        self._predictor = predictor
        self._cache_bytes = cache_bytes
        self._cache: OrderedDict[tuple[Path, int], _Embedded] = OrderedDict()
        self._lock = Lock()

    def embed(self, path: Path) -> tuple[int, int]:
        """Prepare an image for clicks; returns its height and width.

        Raises:
            UnreadableError: it cannot be read or is too large.
        """
        with self._lock:
            return self._embedded(path).size

    def click(
        self, path: Path, points: Any, labels: Any, known: Sequence[Any], base: Sequence[Any]
    ) -> dict[str, Any] | None:
        """The object with some points and without others; None if nothing is left of it.

        Args:
            path: the image.
            points: x and y of each point.
            labels: for each point 1 (on the object) or 0 (not on it); see ``merge_masks``.
            known: runs of the masks of other objects, whose pixels are not offered again.
            base: runs of the mask to start from, if any; it counts as that of one more point.

        Raises:
            UnreadableError: see ``embed``.
            ValueError: a point, label or mask is invalid.
        """
        with self._lock:
            embedded = self._embedded(path)
            size, small = embedded.size, embedded.small
            known_pixels, base_pixels = union(known, *size), union(base, *size)
            positions = (np.asarray(points) + 0.5) * np.divide(small, size)[::-1]
            points = torch.from_numpy(np.floor(positions)).float()
            found = embedded.points.predict(points, exclude=_resize(known_pixels, small))
        if len(labels) != len(found) or not set(labels) <= {0, 1}:
            raise ValueError("labels must be 0 or 1, one for each point")
        masks, on_object = found.pred_masks, torch.tensor(labels).bool()
        start = _resize(base_pixels, small)
        if start.any():
            masks = torch.cat([torch.from_numpy(start)[None], masks])
            points = torch.cat([torch.tensor([most_interior_pixel(start)]), points])
            on_object = torch.cat([torch.tensor([True]), on_object])
        if not on_object.any():
            raise ValueError("a point must be on the object")
        merged = merge_masks(masks.float(), points, on_object, mask_threshold=0.5) > 0.5
        changes = _resize(merged.numpy() ^ start, size)  # the rest stays as exact as it was
        first = labels.index(1) if 1 in labels else 0
        return self._object(
            (base_pixels ^ changes) & ~known_pixels,
            int(found.pred_classes[first]),
            float(found.scores[first]),
        )

    def find_all(self, path: Path, known: Sequence[Any]) -> list[dict[str, Any]]:
        """All objects that the model finds by itself, without the known ones; see ``click``."""
        image, size = self._read(path)
        with self._lock:
            found = self._predictor.predict(image).instances
        free = ~union(known, *size)
        objects = []
        for mask, index, score in zip(
            found.pred_masks.numpy(), found.pred_classes.tolist(), found.scores.tolist()
        ):
            mask = _resize(mask, size)
            rest = mask & free
            if score >= _MIN_SCORE and rest.sum() >= (1 - _MAX_KNOWN) * mask.sum():
                objects.append(self._object(rest, index, score))
        return [found for found in objects if found]

    def _read(self, path: Path) -> tuple[np.ndarray, tuple[int, int]]:
        """The image, smaller if it is large, and its height and width before that."""
        image = as_rgb(path, max_pixels=self._predictor.max_pixels)
        height, width = image.shape[:2]
        scale = min(1.0, _LARGEST_SIDE / max(height, width))
        small = max(1, round(scale * width)), max(1, round(scale * height))
        return cv2.resize(image, small, interpolation=cv2.INTER_AREA), (height, width)

    def _embedded(self, path: Path) -> _Embedded:
        key = path, path.stat().st_mtime_ns
        if key not in self._cache:
            points = AdaptISPredictor(
                self._predictor.model,
                resize=self._predictor.resize,
                input_format=self._predictor.input_format,
            )
            image, size = self._read(path)
            points.set_image(image)
            used = tensor_bytes([*vars(points).values()])
            self._cache[key] = _Embedded(points, size, image.shape[:2], used)
        self._cache.move_to_end(key)
        used = sum(embedded.bytes for embedded in self._cache.values())
        while used > self._cache_bytes and len(self._cache) > 1:
            used -= self._cache.popitem(last=False)[1].bytes
        return self._cache[key]

    def _object(self, mask: np.ndarray, index: int, score: float) -> dict[str, Any] | None:
        if not mask.any():
            return None
        return {"class": self.names[index], "score": score, **describe(mask)}


def _resize(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A mask (H, W) of bool in another size."""
    if mask.shape == size:
        return mask
    return cv2.resize(mask.view(np.uint8) * 255, size[::-1], interpolation=cv2.INTER_LINEAR) > 127


def describe(mask: np.ndarray) -> dict[str, Any]:
    """Area, box and runs of a mask (H, W) of bool that is not empty; see ``Segmenter``."""
    columns, rows = mask.any(axis=0).nonzero()[0], mask.any(axis=1).nonzero()[0]
    (left, right), (top, bottom) = columns[[0, -1]] + (0, 1), rows[[0, -1]] + (0, 1)
    strip = mask[:, left:right].ravel(order="F")
    changes = np.flatnonzero(np.diff(strip, prepend=False, append=False))
    edges = np.concatenate([[0], left * len(mask) + changes, [mask.size]])
    runs = np.diff(edges).tolist()
    box = [int(left), int(top), int(right - left), int(bottom - top)]
    return {"area": int(strip.sum()), "box": box, "counts": runs if runs[-1] else runs[:-1]}


def rle_of(counts: Any, height: int, width: int) -> dict[str, Any]:
    """Compressed RLE of the runs of a mask.

    Raises:
        ValueError: they are no runs of a mask of this size, or the mask is empty.
    """
    # pycocotools reads beyond its memory where the runs do not add up to the image
    are_runs = isinstance(counts, list) and all(type(run) is int and run >= 0 for run in counts)
    if not are_runs or sum(counts) != height * width or not sum(counts[1::2]):
        raise ValueError(f"a mask is empty, or is not that of an image of {width} x {height}")
    return mask_util.frPyObjects({"size": [height, width], "counts": counts}, height, width)


def union(masks: Sequence[Any], height: int, width: int) -> np.ndarray:
    """(height, width) bool: the pixels of any of the masks, given as runs."""
    rles = [rle_of(counts, height, width) for counts in masks]
    if not rles:
        return np.zeros((height, width), bool)
    return mask_util.decode(mask_util.merge(rles)).astype(bool)


def tensor_bytes(value: Any) -> int:
    """Memory of the tensors in nested lists, tuples and dataclasses."""
    if isinstance(value, torch.Tensor):
        return value.untyped_storage().nbytes()
    if dataclasses.is_dataclass(value):
        value = list(vars(value).values())
    return sum(map(tensor_bytes, value)) if isinstance(value, (list, tuple)) else 0
