"""RoIAlign on the level that fits a box (CenterMask, section 3.2)."""

import torch
from detectron2.modeling.poolers import ROIPooler, convert_boxes_to_pooler_format
from detectron2.structures import Boxes
from torch import Tensor

CRITERIA = ("ratio", "area")
# Boxes are not followed further out of the image, in its sides.
_MAX_REACH = 16


def assign_by_ratio(
    box_areas: Tensor, image_areas: Tensor, *, min_level: int, max_level: int
) -> Tensor:
    """The coarsest level for boxes of more than half of their image, the next finer for a quarter.

    level = ceil(max_level - log2(image area / box area)), between ``min_level`` and ``max_level``.

    Args:
        box_areas, image_areas: (n,) in square pixels of the network's input, without padding.
        min_level, max_level: binary logarithms of strides.

    Returns:
        (n,) int64, 0 for ``min_level``.
    """
    ratio = image_areas.float() / box_areas.float().clamp(min=0)
    ratio = ratio + torch.finfo(torch.float32).eps  # a box without end goes to the last level
    level = torch.ceil(max_level - ratio.log2()).clamp(min_level, max_level)
    return level.long() - min_level


class AdaptiveROIPooler(ROIPooler):
    """Detectron2's pooler with a choice of how a box gets its level."""

    def __init__(self, *, criterion: str, **options):
        """
        Args:
            criterion: "ratio", see ``assign_by_ratio``, or "area", the rule of FPN.
            options: see ``ROIPooler``.

        Raises:
            ValueError: the criterion is neither.
        """
        if criterion not in CRITERIA:
            raise ValueError(
                f"MODEL.CENTERMASK.ASSIGN_CRITERION must be one of {', '.join(CRITERIA)}, "
                f"not {criterion!r}"
            )
        super().__init__(**options)
        self.criterion = criterion

    def forward(
        self, x: list[Tensor], box_lists: list[Boxes], image_sizes: list[tuple[int, int]]
    ) -> Tensor:
        """
        Args:
            x: a feature (N, C, H, W) per level.
            box_lists: boxes of each image, in pixels of the network's input.
            image_sizes: height and width of each image before padding.

        Returns:
            (n, C, *output_size) of the boxes of all images, float32.
        """
        # Detectron2's RoIAlign brings boxes to the type of the features, and half precision has
        # but 11 bits for a coordinate.
        x = [feature.float() for feature in x]
        # The samples of RoIAlign grow with a box's area, which in a model that diverges has no end.
        limit = _MAX_REACH * max(max(size) for size in image_sizes)
        box_lists = [Boxes(boxes.tensor.clamp(-limit, limit)) for boxes in box_lists]
        if self.criterion == "area":
            return super().forward(x, box_lists)
        rois = convert_boxes_to_pooler_format(box_lists)
        levels = self.assign(box_lists, image_sizes)
        pooled = x[0].new_zeros((len(rois), x[0].shape[1], *self.output_size))
        for level, pooler in enumerate(self.level_poolers):
            index = (levels == level).nonzero()[:, 0]
            # a level without boxes is pooled from too: that connects it to the losses
            pooled.index_put_((index,), pooler(x[level], rois[index]))
        return pooled

    def assign(self, box_lists: list[Boxes], image_sizes: list[tuple[int, int]]) -> Tensor:
        """(n,) index of each box's level, by ratio."""
        areas = [height * width for height, width in image_sizes]
        image_areas = [
            boxes.tensor.new_full((len(boxes),), a) for a, boxes in zip(areas, box_lists)
        ]
        return assign_by_ratio(
            torch.cat([boxes.area() for boxes in box_lists]),
            torch.cat(image_areas),
            min_level=self.min_level,
            max_level=self.max_level,
        )
