"""The head of FCOS."""

import math
from typing import NamedTuple

import torch
from detectron2.layers import Conv2d
from torch import Tensor, nn
from torch.nn import functional as F

from ..options import check_at_least, check_channels


class FCOSOutputs(NamedTuple):
    """Outputs of ``FCOSHead``, per level."""

    class_logits: list[Tensor]  # (N, C, H, W)
    distances: list[Tensor]  # (N, 4, H, W) to left, top, right, bottom; in strides, not negative
    centerness: list[Tensor]  # (N, 1, H, W) logits


class FCOSHead(nn.Module):
    """Two towers, shared by all levels; the box tower also predicts centerness."""

    def __init__(
        self,
        *,
        in_channels: int,
        num_levels: int,
        num_classes: int,
        num_class_convs: int = 4,
        num_box_convs: int = 4,
    ):
        """
        Args:
            in_channels: channels of all features and of the towers.
            num_levels: number of levels; each has a learned factor on its distances.
            num_classes: C.
            num_class_convs, num_box_convs: 3x3 convolutions of each tower, with group norm and
                ReLU.

        Raises:
            ValueError: an argument has an unsupported value.
        """
        super().__init__()
        check_at_least(0, num_class_convs=num_class_convs, num_box_convs=num_box_convs)
        check_channels("GN", in_channels=in_channels)
        self.class_tower, self.box_tower = (
            nn.Sequential(*(_conv3x3(in_channels, in_channels, norm=True) for _ in range(n)))
            for n in (num_class_convs, num_box_convs)
        )
        self.class_logits = _conv3x3(in_channels, num_classes)
        self.box_pred = _conv3x3(in_channels, 4)
        self.centerness = _conv3x3(in_channels, 1)
        # each class has a probability of 0.01 before training
        nn.init.constant_(self.class_logits.bias, -math.log(99))
        self.scales = nn.Parameter(torch.ones(num_levels))

    def forward(self, features: list[Tensor]) -> FCOSOutputs:
        """One feature (N, in_channels, H, W) per level."""
        class_logits, distances, centerness = [], [], []
        for feature, scale in zip(features, self.scales):
            box_feature = self.box_tower(feature)
            class_logits.append(self.class_logits(self.class_tower(feature)))
            distances.append(F.relu_(self.box_pred(box_feature).float() * scale))
            centerness.append(self.centerness(box_feature))
        return FCOSOutputs(class_logits, distances, centerness)


class _GroupNorm(nn.GroupNorm):
    """Accepts groups of one value, unlike PyTorch's: P7 of a small image is one pixel."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


def _conv3x3(in_channels: int, out_channels: int, *, norm: bool = False) -> Conv2d:
    """A 3x3 convolution with a bias, as published, also where group norm and ReLU follow."""
    conv = Conv2d(
        in_channels,
        out_channels,
        kernel_size=3,
        padding=1,
        norm=_GroupNorm(32, out_channels) if norm else None,
        activation=F.relu_ if norm else None,
    )
    nn.init.normal_(conv.weight, std=0.01)
    nn.init.zeros_(conv.bias)
    return conv
