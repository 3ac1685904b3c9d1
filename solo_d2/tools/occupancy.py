"""Counting the objects that get a grid cell of the SOLO family, with the functions of its targets.

A cell predicts one mask, so only one of the objects that claim it gets it. An object without a cell
on any level cannot be learned.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import detection_utils
from detectron2.data import transforms as T
from detectron2.modeling import build_backbone
from detectron2.structures import ImageList
from torch import Tensor

from solo_d2.layers.masks import mass_centers
from solo_d2.modeling.solo.targets import assign_cells, last_claims

_CHUNK = 64  # masks that are rasterized at a time


class Objects(NamedTuple):
    """The objects of one image as the network sees them; N may be 0."""

    boxes: Tensor  # (N, 4) x1, y1, x2, y2 in input pixels
    centers: Tensor  # (N, 2) mass center (x, y) of each mask in pixel indices
    areas: Tensor  # (N,) pixels of each mask
    extent: tuple[int, int]  # height and width that the grids span


class Cells:
    """Counts of the objects with and without a cell at test size, each image padded by itself.

    Attributes:
        levels: per level, [objects in its scale range, those of them that get no cell there].
        objects: all objects. Each has a cell or is in one of the next four counts.
        empty: whose mask has no pixel left at that size.
        too_small, out_of_range: with a scale below, or above or between, all ranges.
        lost: that get none of the cells that they claim.
        scales: sqrt(box area) of the objects with pixels, one tensor per image.
    """

    def __init__(self, cfg: CfgNode):
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
        with torch.device("meta"):  # without weights: only its padding is needed
            backbone = build_backbone(cfg)
        self._padding = (backbone.size_divisibility, 0.0, backbone.padding_constraints)
        self._resize = T.ResizeShortestEdge(cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)
        self._num_grids = list(solo.NUM_GRIDS)
        self._ranges = [list(bounds) for bounds in solo.SCALE_RANGES]
        self._sigma = solo.CENTER_SIGMA
        self.levels = [[0, 0] for _ in self._num_grids]
        self.objects = self.empty = self.too_small = self.out_of_range = self.lost = 0
        self.scales: list[Tensor] = []

    @property
    def without_cell(self) -> int:
        return self.empty + self.too_small + self.out_of_range + self.lost

    def see(self, record: dict[str, Any]) -> Objects:
        """The objects, without crowds, of a Detectron2 dataset dict with boxes and masks.

        Raises:
            ValueError: a mask cannot be rasterized.
        """
        shape = record["height"], record["width"]
        resize = self._resize.get_transform(np.broadcast_to(np.uint8(0), shape))  # reads its shape
        size = (resize.new_h, resize.new_w) if isinstance(resize, T.ResizeTransform) else shape
        batch = ImageList.from_tensors([torch.empty(size, device="meta")], *self._padding)
        parts = [(torch.zeros(0, 4), torch.zeros(0, 2), torch.zeros(0, dtype=torch.long))]
        parts += self._rasterize(record["annotations"], T.TransformList([resize]), size)
        boxes, centers, areas = (torch.cat(column) for column in zip(*parts))
        return Objects(boxes, centers, areas, tuple(batch.tensor.shape[-2:]))

    def _rasterize(
        self, annotations: list[dict[str, Any]], transforms: T.TransformList, size: tuple[int, int]
    ) -> Iterator[tuple[Tensor, ...]]:
        """Boxes, centers and areas, as bitmasks also of polygons, as in the model."""
        annotations = [a for a in annotations if not a.get("iscrowd", 0)]
        for start in range(0, len(annotations), _CHUNK):
            resized = [
                detection_utils.transform_instance_annotations(dict(a), transforms, size)
                for a in annotations[start : start + _CHUNK]
            ]
            found = detection_utils.annotations_to_instances(resized, size, mask_format="bitmask")
            yield found.gt_boxes.tensor, *mass_centers(found.gt_masks.tensor.bool())

    def add(self, image: Objects) -> None:
        """Count the objects of an image."""
        count = len(image.boxes)
        targets = assign_cells(
            image.boxes,
            torch.zeros(count, dtype=torch.long),
            image.centers,
            image.areas,
            image.extent,
            num_classes=1,
            num_grids=self._num_grids,
            scale_ranges=self._ranges,
            sigma=self._sigma,
        )
        kept = last_claims(targets, self._num_grids)
        claims, gets = torch.zeros(2, len(self.levels), count, dtype=torch.bool)
        claims[targets.level, targets.instance] = True
        gets[kept.level, kept.instance] = True
        for level, claiming, getting in zip(self.levels, claims, gets):
            level[0] += int(claiming.sum())
            level[1] += int((claiming & ~getting).sum())
        scales = (image.boxes[:, 2:] - image.boxes[:, :2]).prod(dim=1).sqrt()
        visible = image.areas > 0
        unclaimed = visible & ~claims.any(dim=0)
        small = unclaimed & (scales < min(low for low, _ in self._ranges))
        self.objects += count
        self.empty += int((~visible).sum())
        self.too_small += int(small.sum())
        self.out_of_range += int((unclaimed & ~small).sum())
        self.lost += int((claims.any(dim=0) & ~gets.any(dim=0)).sum())
        self.scales.append(scales[visible])
