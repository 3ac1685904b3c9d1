"""The head that predicts the IoU of masks, and its targets (Mask Scoring R-CNN, arXiv 1903.00241).

As published for CenterMask, the IoU is computed with the whole object, not only with its part in
the box.
"""

import numpy as np
import pycocotools.mask as mask_util
import torch
from detectron2.layers import Conv2d, ROIAlign
from detectron2.structures import BitMasks, PolygonMasks
from fvcore.nn import weight_init
from torch import Tensor, nn
from torch.nn import functional as F

from ..options import check_at_least


class MaskIoUHead(nn.Module):
    """Predicts the IoU of a mask with its object, for every possible class of the object."""

    def __init__(
        self,
        *,
        in_channels: int,
        in_size: int,
        num_classes: int,
        num_conv: int = 4,
        conv_dim: int = 256,
        fc_dim: int = 1024,
    ):
        """
        Args:
            in_channels: channels of the pooled features.
            in_size: S.
            num_classes: C.
            num_conv, conv_dim: 3x3 convolutions, the last of stride 2.
            fc_dim: units of the two linear layers.

        Raises:
            ValueError: an argument has an unsupported value.
        """
        super().__init__()
        check_at_least(1, num_conv=num_conv, conv_dim=conv_dim, fc_dim=fc_dim)
        self.convs: list[Conv2d] = []
        channels = in_channels + 1
        for k in range(1, num_conv + 1):
            stride = 2 if k == num_conv else 1
            conv = Conv2d(channels, conv_dim, 3, stride=stride, padding=1, activation=F.relu)
            weight_init.c2_msra_fill(conv)
            self.add_module(f"conv{k}", conv)
            self.convs.append(conv)
            channels = conv_dim
        self.fc1 = nn.Linear(conv_dim * ((in_size + 1) // 2) ** 2, fc_dim)
        self.fc2 = nn.Linear(fc_dim, fc_dim)
        self.predictor = nn.Linear(fc_dim, num_classes)
        for fc in (self.fc1, self.fc2):
            # not c2_xavier_fill
            nn.init.kaiming_normal_(fc.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(fc.bias)
        nn.init.normal_(self.predictor.weight, std=0.01)
        nn.init.zeros_(self.predictor.bias)

    def forward(self, features: Tensor, mask_probs: Tensor) -> Tensor:
        """
        Args:
            features: (R, in_channels, S, S).
            mask_probs: (R, 2 S, 2 S) in [0, 1].

        Returns:
            (R, C), not limited to [0, 1].
        """
        mask = F.max_pool2d(mask_probs[:, None], kernel_size=2)
        x = torch.cat([features, mask.to(features.dtype)], dim=1)
        for conv in self.convs:
            x = conv(x)
        x = F.relu(self.fc1(x.flatten(1)))
        return self.predictor(F.relu(self.fc2(x)))


def mask_iou_targets(predicted: Tensor, targets: Tensor, visible: Tensor) -> Tensor:
    """IoU of masks with whole objects, which may lie partly outside the boxes.

    Args:
        predicted, targets: (R, 2 S, 2 S) bool: masks and objects in their boxes.
        visible: (R,) share of the object's area inside the box.

    Returns:
        (R,) float32 in [0, 1]; 0 for an empty object.
    """
    overlap = (predicted & targets).sum(dim=(1, 2))
    # area of the whole object in pixels of this grid
    whole = targets.sum(dim=(1, 2)) / visible.clamp(1e-10, 1)
    union = predicted.sum(dim=(1, 2)) + whole - overlap
    return overlap / union.clamp(min=1)


def crop_masks(masks: PolygonMasks | BitMasks, index: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Crop masks to boxes and resize them to squares, as Detectron2's ``crop_and_resize`` does.

    Args:
        masks: masks of all objects of an image.
        index: (R,) index of each box's mask.
        boxes: (R, 4).
        size: side of the result.

    Returns:
        (R, size, size) bool.
    """
    if isinstance(masks, PolygonMasks):
        return masks[index].crop_and_resize(boxes, size)
    # convert each mask to float once, however many boxes it has
    used, inverse = index.unique(return_inverse=True)
    rois = torch.cat([inverse[:, None].to(boxes.dtype), boxes], dim=1)
    align = ROIAlign((size, size), spatial_scale=1.0, sampling_ratio=0, aligned=True)
    return align(masks.tensor[used, None].float(), rois)[:, 0] >= 0.5


def visible_share(masks: PolygonMasks | BitMasks, index: Tensor, boxes: Tensor) -> Tensor:
    """Share of an object's area inside a box; 0 for an empty object.

    The box's size is rounded down to pixels. As in the published code, polygons are rasterized on a
    grid of that size that starts at the box's corner. For bitmasks the area is computed directly;
    the two differed by up to 0.006. Args: see ``crop_masks``.

    Returns:
        (R,) float32 in [0, 1].
    """
    area_of = _polygon_areas if isinstance(masks, PolygonMasks) else _bitmask_areas
    inside, whole = area_of(masks, index, boxes)
    return torch.where(whole > 0, inside / whole, 0).clamp(0, 1).to(boxes)


def _polygon_areas(masks: PolygonMasks, index: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Pixels in the boxes and areas of the polygons, (R,) float64; parts are summed."""
    whole = masks.area().double()[index.cpu()]
    inside = []
    for i, box in zip(index.tolist(), boxes.cpu().numpy()):
        width, height = box[2:] - box[:2]
        if min(width, height) < 1 or not masks.polygons[i]:
            inside.append(0.0)
            continue
        parts = [part - np.resize(box[:2], part.shape) for part in masks.polygons[i]]
        inside.append(mask_util.area(mask_util.frPyObjects(parts, int(height), int(width))).sum())
    return torch.tensor(inside, dtype=torch.float64), whole


def _bitmask_areas(masks: BitMasks, index: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Areas inside the boxes and whole areas, (R,) float32."""
    used, mask = index.unique(return_inverse=True)
    # sums[m, y, x]: pixels of mask m in row y, up to and including column x
    sums = masks.tensor[used].cumsum(dim=2, dtype=torch.int32)
    height, width = sums.shape[1:]

    def area_left_of(x: Tensor) -> Tensor:
        """(R,) -> (R, H) area per row, with a fraction of the pixel that x lies in."""
        x = x.clamp(0, width)
        column = x.long().clamp(max=width - 1)
        including = sums[mask, :, column].float()
        before = sums[mask, :, (column - 1).clamp(min=0)] * (column > 0)[:, None]
        return torch.lerp(before.float(), including, (x - column)[:, None])

    x1, y1 = boxes[:, 0], boxes[:, 1]
    x2 = x1 + (boxes[:, 2] - x1).floor().clamp(min=0)
    y2 = y1 + (boxes[:, 3] - y1).floor().clamp(min=0)
    row = torch.arange(height, device=boxes.device)
    share = torch.minimum(y2[:, None], row + 1) - torch.maximum(y1[:, None], row)
    inside = (area_left_of(x2) - area_left_of(x1)) * share.clamp(min=0)
    return inside.sum(dim=1), sums[mask, :, -1].sum(dim=1).float()
