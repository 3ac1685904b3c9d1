"""Assignment of a data set's objects to the grid cells of the SOLO family, before training.

A cell predicts one mask, so only one of the objects that claim it gets it. An object without a cell
on any level cannot be found. Everything is counted with the functions that compute the targets.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import detection_utils
from detectron2.data import transforms as T
from detectron2.modeling import build_backbone
from detectron2.structures import BitMasks, ImageList
from torch import Tensor

from solo_d2.layers.masks import mass_centers
from solo_d2.modeling.solo.targets import assign_cells, last_claims, level_offsets

# Number of masks that are rasterized at a time.
_CHUNK = 64


class Objects(NamedTuple):
    """The objects of one image as the network sees them; N may be 0."""

    boxes: Tensor  # (N, 4) x1, y1, x2, y2 in input pixels
    centers: Tensor  # (N, 2) mass center (x, y) of each mask in pixel indices
    areas: Tensor  # (N,) pixels of each mask
    extent: tuple[int, int]  # height and width that the grids span


class NetworkInput(NamedTuple):
    """Resizing and padding of images and their annotations."""

    min_size: int  # shorter side of the resized image; 0: no resize
    max_size: int
    size_divisibility: int = 0  # of the backbone, like the next
    padding_constraints: dict[str, int] | None = None

    @classmethod
    def from_config(cls, cfg: CfgNode) -> "NetworkInput":
        """For the test size. The backbone is built without weights, only to get its padding."""
        with torch.device("meta"):
            backbone = build_backbone(cfg)
        return cls(
            cfg.INPUT.MIN_SIZE_TEST,
            cfg.INPUT.MAX_SIZE_TEST,
            backbone.size_divisibility,
            backbone.padding_constraints,
        )

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the resized image."""
        if self.min_size == 0:
            return height, width
        return T.ResizeShortestEdge.get_output_shape(height, width, self.min_size, self.max_size)

    def objects(self, record: dict[str, Any]) -> Objects:
        """The objects, without crowds, of a Detectron2 dataset dict with boxes and masks.

        Raises:
            ValueError: a mask cannot be rasterized.
        """
        height, width = record["height"], record["width"]
        image = np.broadcast_to(np.uint8(0), (height, width))  # only its shape is read
        resize = T.ResizeShortestEdge(self.min_size, self.max_size)
        transforms = T.TransformList([resize.get_transform(image)])
        size = self.size(height, width)
        annotations = [a for a in record["annotations"] if not a.get("iscrowd", 0)]
        boxes, centers, areas = [torch.zeros(0, 4)], [torch.zeros(0, 2)], [torch.zeros(0).long()]
        for start in range(0, len(annotations), _CHUNK):
            instances = detection_utils.annotations_to_instances(
                [
                    detection_utils.transform_instance_annotations(dict(a), transforms, size)
                    for a in annotations[start : start + _CHUNK]
                ],
                size,
                mask_format="bitmask",  # also for polygons, as in the model
            )
            masks: BitMasks = instances.gt_masks
            center, area = mass_centers(masks.tensor.bool())
            boxes.append(instances.gt_boxes.tensor)
            centers.append(center)
            areas.append(area)
        batch = ImageList.from_tensors(
            [torch.empty(size, device="meta")],
            self.size_divisibility,
            padding_constraints=self.padding_constraints,
        )
        extent = tuple(batch.tensor.shape[-2:])
        return Objects(torch.cat(boxes), torch.cat(centers), torch.cat(areas), extent)


class Grids(NamedTuple):
    """The settings of MODEL.SOLO that affect cells; see ``assign_cells``."""

    num_grids: list[int]
    scale_ranges: list[list[float]]
    sigma: float
    inclusive_boxes: bool = False

    @classmethod
    def from_config(cls, cfg: CfgNode) -> "Grids":
        """
        Raises:
            ValueError: the numbers of grids and ranges differ.
        """
        solo = cfg.MODEL.SOLO
        if len(solo.NUM_GRIDS) != len(solo.SCALE_RANGES):
            raise ValueError(
                "MODEL.SOLO needs one entry per level in each of "
                f"NUM_GRIDS: {len(solo.NUM_GRIDS)}, SCALE_RANGES: {len(solo.SCALE_RANGES)}"
            )
        ranges = [list(bounds) for bounds in solo.SCALE_RANGES]
        return cls(list(solo.NUM_GRIDS), ranges, solo.CENTER_SIGMA)

    def scales(self, boxes: Tensor) -> Tensor:
        """(N,) sqrt(box area), which is compared with the ranges."""
        sides = boxes[:, 2:] - boxes[:, :2] - float(self.inclusive_boxes)
        return sides.clamp(min=0).prod(dim=1).sqrt()

    def in_range(self, scales: Tensor) -> Tensor:
        """(N,) bool: whether any level takes objects of that scale."""
        bounds = torch.tensor(self.scale_ranges, dtype=torch.float32)
        return ((scales >= bounds[:, :1]) & (scales <= bounds[:, 1:])).any(dim=0)


class Level(NamedTuple):
    """Counts of objects on one level."""

    assigned: int  # with a scale in the level's range
    shared: int  # that claim a cell that another object claims too
    lost: int  # that get none of the cells that they claim


class Occupancy(NamedTuple):
    """Counts of objects; each object has a cell or is in one of the last three counts."""

    levels: list[Level]
    objects: int
    empty: int  # whose mask has no pixel left at that size
    out_of_range: int  # with a scale that no level takes
    lost: int  # that get no cell on any of their levels

    @property
    def without_cell(self) -> int:
        return self.empty + self.out_of_range + self.lost


class Advice(NamedTuple):
    """A changed setting and its effect."""

    key: str
    value: list[Any] | float | int
    occupancy: Occupancy
    cells: int  # of all levels


def occupancy(images: Iterable[Objects], grids: Grids) -> Occupancy:
    """Count the objects with and without a cell."""
    levels = torch.zeros(len(grids.num_grids), 3, dtype=torch.long)
    objects = empty = out_of_range = lost = 0
    for image in images:
        count = len(image.boxes)
        targets = assign_cells(
            image.boxes,
            torch.zeros(count, dtype=torch.long),
            image.centers,
            image.areas,
            image.extent,
            num_classes=1,
            num_grids=grids.num_grids,
            scale_ranges=grids.scale_ranges,
            sigma=grids.sigma,
            inclusive_boxes=grids.inclusive_boxes,
        )
        offsets = torch.tensor(level_offsets(grids.num_grids))
        flat = targets.cell + offsets[targets.level]
        claims = flat.bincount(minlength=int(offsets[-1]))[flat]
        kept = last_claims(targets, grids.num_grids)
        assigned, shared, gets = torch.zeros(3, len(levels), count, dtype=torch.bool)
        assigned[targets.level, targets.instance] = True
        shared[targets.level[claims > 1], targets.instance[claims > 1]] = True
        gets[kept.level, kept.instance] = True

        levels += torch.stack([x.sum(dim=1) for x in (assigned, shared, assigned & ~gets)], dim=1)
        objects += count
        empty += int((image.areas == 0).sum())
        out_of_range += int((~assigned.any(dim=0) & (image.areas > 0)).sum())
        lost += int((assigned.any(dim=0) & ~gets.any(dim=0)).sum())
    counts = [Level(*row) for row in levels.tolist()]
    return Occupancy(counts, objects, empty, out_of_range, lost)


def advise(images: Sequence[Objects], grids: Grids, now: Occupancy) -> list[Advice]:
    """Changes of a single setting that would give more objects a cell, best first.

    Args:
        images: all images of a data set.
        grids: the current settings.
        now: the counts with the current settings.
    """
    found = []
    if now.lost or now.out_of_range:
        for key, changed in _candidates(images, grids, now):
            then = occupancy(images, changed)
            if then.without_cell < now.without_cell:
                value = getattr(changed, _FIELDS[key])
                cells = level_offsets(changed.num_grids)[-1]
                found.append(Advice(f"MODEL.SOLO.{key}", value, then, cells))
    return sorted(found, key=lambda advice: (advice.occupancy.without_cell, advice.cells))


_FIELDS = {"NUM_GRIDS": "num_grids", "SCALE_RANGES": "scale_ranges", "CENTER_SIGMA": "sigma"}


def _candidates(
    images: Sequence[Objects], grids: Grids, now: Occupancy
) -> Iterator[tuple[str, Grids]]:
    """(key, changed settings) to try."""
    if now.out_of_range:
        scales = torch.cat([grids.scales(x.boxes)[x.areas > 0] for x in images])
        outside = scales[~grids.in_range(scales)]
        yield "SCALE_RANGES", grids._replace(scale_ranges=_widen(grids.scale_ranges, outside))
    if now.lost:
        crowded = [level.lost > 0 for level in now.levels]
        for factor in (1.25, 1.5, 2.0):
            finer = [
                math.ceil(factor * number) if more else number
                for number, more in zip(grids.num_grids, crowded)
            ]
            yield "NUM_GRIDS", grids._replace(num_grids=finer)
        if len(grids.scale_ranges) > 1:
            # finer levels take larger objects too
            for factor in (1.5, 2.0):
                ranges = [[low, round(factor * high)] for low, high in grids.scale_ranges]
                ranges[-1] = grids.scale_ranges[-1]
                yield "SCALE_RANGES", grids._replace(scale_ranges=ranges)
        yield "CENTER_SIGMA", grids._replace(sigma=grids.sigma / 2)


def _widen(ranges: Sequence[Sequence[float]], scales: Tensor) -> list[list[float]]:
    """Move bounds as little as possible, to whole pixels, so that ``scales`` are in a range."""
    widened = [list(bounds) for bounds in ranges]
    for scale in scales.sort().values.tolist():
        if any(low <= scale <= high for low, high in widened):
            continue
        above = [bounds for bounds in widened if bounds[0] > scale]
        if above:
            min(above)[0] = math.floor(scale)
        else:
            max(widened, key=lambda bounds: bounds[1])[1] = math.ceil(scale)
    return widened
