"""The head of FCOS."""

import math
from typing import NamedTuple

import torch
from detectron2.layers import Conv2d, get_norm
from torch import Tensor, nn
from torch.nn import functional as F

from ..options import check_channels


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
        norm: str = "GN",
        prior_prob: float = 0.01,
    ):
        """
        Args:
            in_channels: channels of all features and of the towers.
            num_levels: number of levels; each has a learned factor on its distances.
            num_classes: C.
            num_class_convs, num_box_convs: 3x3 convolutions of each tower, with norm and ReLU.
            norm: see ``detectron2.layers.get_norm``; "GN" has 32 groups, "" is no norm.
            prior_prob: probability of each class before training.

        Raises:
            ValueError: an argument has an unsupported value.
        """
        super().__init__()
        if not 0 < prior_prob < 1:
            raise ValueError(f"prior_prob must be between 0 and 1, not {prior_prob!r}")
        if min(num_class_convs, num_box_convs) < 0:
            raise ValueError(
                "num_class_convs and num_box_convs must be 0 or more, "
                f"not {num_class_convs!r} and {num_box_convs!r}"
            )
        check_channels(norm, in_channels=in_channels)
        self.class_tower = _tower(num_class_convs, in_channels, norm)
        self.box_tower = _tower(num_box_convs, in_channels, norm)
        self.class_logits = _conv3x3(in_channels, num_classes)
        self.box_pred = _conv3x3(in_channels, 4)
        self.centerness = _conv3x3(in_channels, 1)
        nn.init.constant_(self.class_logits.bias, -math.log((1 - prior_prob) / prior_prob))
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


def _tower(num_convs: int, channels: int, norm: str) -> nn.Sequential:
    return nn.Sequential(
        *(
            _conv3x3(
                channels,
                channels,
                norm=_GroupNorm(32, channels) if norm == "GN" else get_norm(norm, channels),
                activation=nn.ReLU(inplace=True),
            )
            for _ in range(num_convs)
        )
    )


def _conv3x3(
    in_channels: int,
    out_channels: int,
    *,
    norm: nn.Module | None = None,
    activation: nn.Module | None = None,
) -> Conv2d:
    """A 3x3 convolution with a bias, even if a norm follows, as in the published code."""
    conv = Conv2d(
        in_channels, out_channels, kernel_size=3, padding=1, norm=norm, activation=activation
    )
    nn.init.normal_(conv.weight, std=0.01)
    nn.init.zeros_(conv.bias)
    return conv
