"""The head that predicts the IoU of masks, and its targets (Mask Scoring R-CNN, arXiv 1903.00241).

As published for CenterMask, the IoU is computed with the whole object, not only with its part in
the box.
"""

from collections.abc import Sequence

import numpy as np
import pycocotools.mask as mask_util
import torch
from detectron2.layers import Conv2d, ROIAlign
from detectron2.structures import BitMasks, PolygonMasks
from fvcore.nn import weight_init
from torch import Tensor, nn
from torch.nn import functional as F

from solo_d2.layers.upload import upload

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
            conv = Conv2d(channels, conv_dim, 3, stride=stride, padding=1, activation=F.relu_)
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
        x = F.relu_(self.fc1(x.flatten(1)))
        return self.predictor(F.relu_(self.fc2(x)))


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


def crop_masks(
    masks: PolygonMasks | BitMasks, index: Sequence[int], boxes: np.ndarray, size: int
) -> Tensor:
    """Crop masks to boxes and resize them to squares, as Detectron2's ``crop_and_resize`` does.

    Args:
        masks: masks of all objects of an image.
        index: of length R, the index of each box's mask.
        boxes: (R, 4) float32.
        size: side of the result.

    Returns:
        (R, size, size) bool, on the device of the masks.
    """
    if isinstance(masks, PolygonMasks):
        return masks[list(index)].crop_and_resize(torch.from_numpy(boxes), size)
    # only the pixels that a box needs become float
    limit = np.array(masks.image_size[::-1])
    low = np.clip(np.floor(boxes[:, :2]) - 1, 0, limit - 1)
    high = np.maximum(np.minimum(np.ceil(boxes[:, 2:]) + 1, limit), low + 1)
    align = ROIAlign((size, size), spatial_scale=1.0, sampling_ratio=0, aligned=True)
    in_window = np.pad(boxes - np.tile(low, 2), ((0, 0), (1, 0)))  # 0: the first of one image
    rois = upload(torch.from_numpy(in_window).float(), masks.device)
    crops = [masks.tensor.new_zeros((0, size, size))]
    for i, (x1, y1), (x2, y2), roi in zip(index, low.astype(int), high.astype(int), rois):
        window = masks.tensor[i, y1:y2, x1:x2].float()
        crops.append(align(window[None, None], roi[None])[0] >= 0.5)
    return torch.cat(crops)


def visible_share(
    masks: PolygonMasks | BitMasks, index: Sequence[int], boxes: np.ndarray
) -> Tensor:
    """Share of an object's area inside a box; 0 for an empty object.

    The box's size is rounded down to pixels. As in the published code, polygons are rasterized on a
    grid of that size that starts at the box's corner. For bitmasks the area is computed directly;
    the two differed by up to 0.006. Args: see ``crop_masks``.

    Returns:
        (R,) float32 in [0, 1].
    """
    area_of = _polygon_areas if isinstance(masks, PolygonMasks) else _bitmask_areas
    inside, whole = area_of(masks, index, boxes)
    return torch.where(whole > 0, inside / whole, 0).clamp(0, 1).float()


def _polygon_areas(
    masks: PolygonMasks, index: Sequence[int], boxes: np.ndarray
) -> tuple[Tensor, Tensor]:
    """Pixels in the boxes and areas of the polygons, (R,) float64; parts are summed."""
    inside = []
    for i, box in zip(index, boxes):
        width, height = box[2:] - box[:2]
        if min(width, height) < 1 or not masks.polygons[i]:
            inside.append(0.0)
            continue
        parts = [part - np.resize(box[:2], part.shape) for part in masks.polygons[i]]
        inside.append(mask_util.area(mask_util.frPyObjects(parts, int(height), int(width))).sum())
    return torch.tensor(inside, dtype=torch.float64), masks.area().double()[list(index)]


def _bitmask_areas(
    masks: BitMasks, index: Sequence[int], boxes: np.ndarray
) -> tuple[Tensor, Tensor]:
    """Areas inside the boxes and whole areas, (R,) float32.

    A box that starts within a pixel covers parts of pixels at its ends. So its area is a weighted
    mean of the four windows of whole pixels around it.
    """
    corner = np.floor(boxes[:, :2]).astype(int)
    size = np.floor(boxes[:, 2:] - boxes[:, :2]).astype(int)
    counts, whole = [], {i: masks.tensor[i].count_nonzero() for i in set(index)}
    for i, (x, y), (w, h) in zip(index, corner, size):
        for top, left in ((y, x), (y, x + 1), (y + 1, x), (y + 1, x + 1)):
            rows, columns = (slice(max(0, a), max(0, a + n)) for a, n in ((top, h), (left, w)))
            counts.append(masks.tensor[i, rows, columns].count_nonzero())
    none = masks.tensor.new_zeros(0, dtype=torch.float32)
    offset = upload(torch.from_numpy(boxes[:, :2] - corner).float(), none.device)
    x, y = offset.unbind(dim=1)
    weights = torch.stack([(1 - y) * (1 - x), (1 - y) * x, y * (1 - x), y * x], dim=1)
    inside = torch.stack([none.new_zeros(()).long(), *counts])[1:].view(-1, 4) * weights
    return inside.sum(dim=1), torch.stack([whole[i] for i in index]).float() if index else none
