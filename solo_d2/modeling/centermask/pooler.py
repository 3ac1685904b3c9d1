"""RoIAlign from the level that fits a box (CenterMask, section 3.2)."""

import math
from collections.abc import Sequence

import torch
from detectron2.layers import ROIAlign
from detectron2.modeling.poolers import assign_boxes_to_levels
from detectron2.structures import Boxes
from torch import Tensor, nn
from torch.nn import functional as F

from ..options import check_choice

CRITERIA = ("ratio", "area")
# Boxes are clipped to this many image sides around the image.
MAX_REACH = 16


def assign_by_ratio(
    box_areas: Tensor, image_areas: Tensor, *, min_level: int, max_level: int
) -> Tensor:
    """The coarsest level for boxes of more than half of their image, the next finer for a quarter.

    level = ceil(max_level - log2(image area / box area)), between ``min_level`` and ``max_level``.

    Args:
        box_areas, image_areas: (R,) in square pixels of the network's input, without padding.
        min_level, max_level: binary logarithms of strides.

    Returns:
        (R,) int64, 0 for ``min_level``.
    """
    ratio = image_areas.float() / box_areas.float().clamp(min=0)
    ratio = ratio + torch.finfo(torch.float32).eps  # a box of infinite area goes to the last level
    level = torch.ceil(max_level - ratio.log2()).clamp(min_level, max_level)
    return level.long() - min_level


class AdaptiveROIPooler(nn.Module):
    """RoIAlign from one level per box; like Detectron2's pooler, with a choice of level rule."""

    def __init__(
        self,
        *,
        output_size: int,
        strides: Sequence[int],
        criterion: str = "ratio",
        sampling_ratio: int = 0,
    ):
        """
        Args:
            output_size: S.
            strides: strides of the levels, each twice the previous one.
            criterion: "ratio", see ``assign_by_ratio``, or "area", the rule of FPN.
            sampling_ratio: samples per side of a cell; 0: one per pixel.

        Raises:
            ValueError: an option has an unsupported value.
        """
        super().__init__()
        check_choice("criterion", criterion, CRITERIA)
        levels = [int(math.log2(stride)) for stride in strides]
        if list(strides) != [2**k for k in range(levels[0], levels[-1] + 1)]:
            raise ValueError(f"strides must be successive powers of 2, not {list(strides)}")
        self.min_level, self.max_level = levels[0], levels[-1]
        self.criterion = criterion
        self.output_size = output_size
        self.aligns = nn.ModuleList(
            ROIAlign((output_size, output_size), 1 / stride, sampling_ratio, aligned=True)
            for stride in strides
        )

    def forward(
        self, x: list[Tensor], box_lists: list[Boxes], image_sizes: list[tuple[int, int]]
    ) -> Tensor:
        """
        Args:
            x: a feature (N, channels, H, W) per level.
            box_lists: boxes of each image, in pixels of the network's input.
            image_sizes: height and width of each image before padding.

        Returns:
            (R, channels, S, S) float32, in the order of the boxes.
        """
        # RoIAlign's cost grows with the area of a box, which is unlimited in a diverging model.
        limit = MAX_REACH * max(max(size) for size in image_sizes)
        box_lists = [Boxes(boxes.tensor.clamp(-limit, limit)) for boxes in box_lists]
        levels = self.assign(box_lists, image_sizes)
        order = levels.argsort(stable=True)
        counts = (levels == torch.arange(len(x), device=levels.device)[:, None]).sum(dim=1).tolist()
        rois = torch.cat([F.pad(b.tensor, (1, 0), value=i) for i, b in enumerate(box_lists)])[order]
        # Features in half precision are pooled as float32: RoIAlign would convert the boxes to
        # their type, which has only 11 bits for a coordinate. Levels without boxes are pooled too,
        # which connects them to the losses.
        parts = zip(self.aligns, x, rois.split(counts))
        pooled = torch.cat([align(feature.float(), part) for align, feature, part in parts])
        return pooled.new_empty(pooled.shape).index_copy(0, order, pooled)

    def assign(self, box_lists: list[Boxes], image_sizes: list[tuple[int, int]]) -> Tensor:
        """(R,) int64 index of each box's level."""
        if self.criterion == "area":
            # FPN's: a box of 224 x 224 pixels belongs to level 4
            return assign_boxes_to_levels(box_lists, self.min_level, self.max_level, 224, 4)
        sizes = zip(box_lists, image_sizes)
        image_areas = [boxes.tensor.new_full((len(boxes),), h * w) for boxes, (h, w) in sizes]
        return assign_by_ratio(
            torch.cat([boxes.area() for boxes in box_lists]),
            torch.cat(image_areas),
            min_level=self.min_level,
            max_level=self.max_level,
        )
