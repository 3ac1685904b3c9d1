"""The category branch of the family's heads, and the layers of all their towers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from detectron2.config import CfgNode
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from torch import Tensor, nn

from solo_d2.layers.deform_conv import DeformConv2d
from solo_d2.layers.resample import ALIGNMENTS, align_to_grid

from ..options import check_channels, check_choice


@dataclass(frozen=True, kw_only=True)
class TowerSpec:
    """How the towers of a head are built: ``num_convs`` times a 3x3 conv, norm, ReLU.

    Args:
        num_convs: at least 1.
        conv_dim: output channels of each conv.
        norm: see Detectron2's ``get_norm``; "" for none.
        deform: which convs are deformable: "none", "last" or "all".
        modulated: deformable convs are DCNv2 instead of v1.

    Raises:
        ValueError: ``num_convs`` or ``deform`` has an unsupported value.
    """

    num_convs: int = 4
    conv_dim: int = 256
    norm: str = "GN"
    deform: str = "none"
    modulated: bool = False

    def __post_init__(self) -> None:
        check_choice("deform", self.deform, ("none", "last", "all"))
        if self.num_convs < 1:
            raise ValueError(f"num_convs must be at least 1, not {self.num_convs!r}")
        check_channels(self.norm, conv_dim=self.conv_dim)

    def build(self, in_channels: int) -> nn.Sequential:
        convs = []
        for i in range(self.num_convs):
            is_last = i == self.num_convs - 1
            conv = conv_norm_relu(
                in_channels if i == 0 else self.conv_dim,
                self.conv_dim,
                norm=self.norm,
                deformable=self.deform == "all" or (self.deform == "last" and is_last),
                modulated=self.modulated,
            )
            convs.append(conv)
        return nn.Sequential(*convs)


@dataclass(frozen=True, kw_only=True)
class HeadSpec:
    """What the heads of the family have in common.

    Args:
        in_channels: channels of every level's feature.
        num_classes, num_grids: C and S; the category output is (N, C, S, S) per level.
        tower: the towers of the category branch and of the branch that masks are made from.
        category_align: how a cell reads the feature, see ``align_to_grid``.
        coord_conv: append coordinates to the input of the branch that masks are made from.
        prior_prob: probability of each class before training; in SOLO and Decoupled SOLO of each
            pixel of a map too.

    Raises:
        ValueError: an argument has an unsupported value.
    """

    in_channels: int
    num_classes: int
    num_grids: Sequence[int]
    tower: TowerSpec
    category_align: str = "interpolate"
    coord_conv: bool = True
    prior_prob: float = 0.01

    def __post_init__(self) -> None:
        check_choice("category_align", self.category_align, tuple(ALIGNMENTS))
        if not all(grid >= 1 for grid in self.num_grids):
            raise ValueError(f"num_grids must all be at least 1, not {list(self.num_grids)}")
        if not 0 < self.prior_prob < 1:
            raise ValueError(f"prior_prob must be between 0 and 1, not {self.prior_prob!r}")

    @classmethod
    def from_config(
        cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec], num_classes: int
    ) -> "HeadSpec":
        solo = cfg.MODEL.SOLO
        return cls(
            in_channels=shared_channels(input_shape, solo.IN_FEATURES),
            num_classes=num_classes,
            num_grids=solo.NUM_GRIDS,
            tower=TowerSpec(
                num_convs=solo.NUM_CONVS,
                conv_dim=solo.CONV_DIM,
                deform=solo.DEFORM,
                modulated=solo.DEFORM_MODULATED,
            ),
            category_align=solo.CATEGORY_ALIGN,
            coord_conv=solo.COORD_CONV,
            prior_prob=solo.PRIOR_PROB,
        )


class CategoryHead(nn.Module):
    """The category branch of the family: a tower and an output conv, shared by all levels.

    A subclass adds the branch that its masks are made from.
    """

    def __init__(self, spec: HeadSpec):
        super().__init__()
        self.num_classes = spec.num_classes
        self.num_grids = list(spec.num_grids)
        self.category_align = spec.category_align
        self.coord_conv = spec.coord_conv
        self.category_tower = spec.tower.build(spec.in_channels)
        self.prior_bias = -math.log((1 - spec.prior_prob) / spec.prior_prob)
        self.category_pred = output_conv(
            spec.tower.conv_dim, spec.num_classes, bias=self.prior_bias
        )

    def forward(self, levels: list[Tensor]) -> list[Tensor]:
        """Features (N, in_channels, h, w) -> category logits (N, C, S, S), per level."""
        cells = [
            align_to_grid(feature, grid, self.category_align)
            for feature, grid in zip(levels, self.num_grids)
        ]
        return [self.category_pred(self.category_tower(x)) for x in cells]


def conv_norm_relu(
    in_channels: int,
    out_channels: int,
    *,
    kernel_size: int = 3,
    norm: str = "GN",
    deformable: bool = False,
    modulated: bool = False,
) -> nn.Module:
    """A conv with weights from normal(0, 0.01); it has a bias only if there is no norm."""
    options = {
        "kernel_size": kernel_size,
        "padding": kernel_size // 2,
        "bias": not norm,
        "norm": get_norm(norm, out_channels),
        "activation": nn.ReLU(inplace=True),
    }
    if deformable:
        conv = DeformConv2d(in_channels, out_channels, modulated=modulated, **options)
    else:
        conv = Conv2d(in_channels, out_channels, **options)
    nn.init.normal_(conv.weight, std=0.01)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv


def output_conv(in_channels: int, out_channels: int, *, bias: float = 0.0) -> Conv2d:
    """A 3x3 conv without activation."""
    conv = Conv2d(in_channels, out_channels, kernel_size=3, padding=1)
    return init_output(conv, bias)


def init_output(conv: Conv2d, bias: float) -> Conv2d:
    """Initialize a conv without activation, in place, with weights from normal(0, 0.01)."""
    nn.init.normal_(conv.weight, std=0.01)
    nn.init.constant_(conv.bias, bias)
    return conv


def shared_channels(input_shape: dict[str, ShapeSpec], names: Sequence[str]) -> int:
    """The number of channels that all named features have.

    Raises:
        ValueError: a feature is missing, or they have different numbers of channels.
    """
    missing = [name for name in names if name not in input_shape]
    if missing:
        raise ValueError(f"the backbone has no feature {missing[0]!r}, only {sorted(input_shape)}")
    channels = {name: input_shape[name].channels for name in names}
    if len(set(channels.values())) != 1:
        raise ValueError(f"the head's features must have the same number of channels: {channels}")
    return channels[names[0]]
