"""One feature map from several levels of a backbone."""

from collections.abc import Sequence

import torch
from detectron2.layers import ASPP, Conv2d, ShapeSpec, get_norm
from torch import Tensor, nn
from torch.nn import functional as F

from ..options import check_at_least, check_choice
from .head import CITYSCAPES_GAIN, SeparableConv, init_weights, resize_corners

_DILATIONS = (12, 24, 36)  # at stride 8
_DETAIL_DIM = 32


class PyramidFusion(nn.Module):
    """Fuses levels of a feature pyramid into one map, as in Semantic FPN (arXiv 1901.02446).

    Each level is convolved and upsampled by 2 until it has the finest stride; then all are summed.
    """

    def __init__(self, levels: Sequence[ShapeSpec], dim: int):
        """
        Args:
            levels: the features, finest first.
            dim: channels of the result.
        """
        super().__init__()
        self.levels = nn.ModuleList()
        for level in levels:
            doublings = (level.stride // levels[0].stride).bit_length() - 1
            widths = [level.channels] + max(1, doublings) * [dim]
            convs = (_conv(a, b, 3) for a, b in zip(widths, widths[1:]))
            self.levels.append(nn.Sequential(*convs))

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Maps of the levels, finest first -> (N, dim, h, w) at the finest stride."""
        size = (features[0].shape[-2], features[0].shape[-1])
        fused = self.levels[0](features[0])
        for level, x in zip(self.levels[1:], features[1:]):
            for conv in level:
                x = conv(x)
                x = resize_corners(x, (2 * x.shape[-2], 2 * x.shape[-1]))
            fused = fused + resize_corners(x, size)
        return fused


class DeepLabFusion(nn.Module):
    """DeepLabV3+ (arXiv 1802.02611): context of a coarse level beside details of a fine one.

    The branch of global pooling is Detectron2's, without a norm: with one image per process it has
    a single value per channel.
    """

    def __init__(self, levels: Sequence[ShapeSpec], dim: int, *, dropout: float = 0.5):
        """
        Args:
            levels: the fine and the coarse feature.
            dim: channels of the result.
            dropout: dropout rate of the context.
        """
        super().__init__()
        if len(levels) != 2:
            raise ValueError(f"fusion 'deeplab' needs 2 features, not {len(levels)}")
        fine, coarse = levels
        self.context = ASPP(
            coarse.channels, dim, _DILATIONS, norm="BN", activation=F.relu_, dropout=dropout
        )
        self.detail = _conv(fine.channels, _DETAIL_DIM, 1)
        self.convs = nn.Sequential(
            SeparableConv(dim + _DETAIL_DIM, dim), SeparableConv(dim, dim), nn.Conv2d(dim, dim, 1)
        )
        init_weights(self, gain=CITYSCAPES_GAIN)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """The fine and the coarse map -> (N, dim, h, w) of the fine one's size."""
        fine, coarse = features
        context = resize_corners(self.context(coarse), (fine.shape[-2], fine.shape[-1]))
        return self.convs(torch.cat([context, self.detail(fine)], dim=1))


def _conv(in_channels: int, out_channels: int, kernel_size: int) -> Conv2d:
    return Conv2d(
        in_channels,
        out_channels,
        kernel_size,
        padding=kernel_size // 2,
        bias=False,
        norm=get_norm("BN", out_channels),
        activation=F.relu_,
    )


_KINDS = {"pyramid": PyramidFusion, "deeplab": DeepLabFusion}


def build_fusion(kind: str, levels: Sequence[ShapeSpec], dim: int) -> nn.Module | None:
    """
    Args:
        kind: "pyramid" or "deeplab".
        levels: features of the backbone, finest first.
        dim: channels of the result.

    Returns:
        A module from the list of features to one map; None for a single feature.

    Raises:
        ValueError: an option has an unsupported value.
    """
    check_choice("fusion", kind, tuple(_KINDS))
    check_at_least(1, dim=dim)
    return _KINDS[kind](levels, dim) if len(levels) > 1 else None
