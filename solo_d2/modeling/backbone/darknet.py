"""DarkNet-53 (YOLOv3, arXiv 1804.02767) as a bottom-up backbone."""

from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling import Backbone
from torch import Tensor, nn

from .registry import check_stages, freeze, register_backbone

# Residual blocks per stage of DarkNet-53.
_BLOCKS = {"res1": 1, "res2": 2, "res3": 8, "res4": 8, "res5": 4}


def _conv(
    in_channels: int, out_channels: int, kernel_size: int, *, norm: str, stride: int = 1
) -> Conv2d:
    """Convolution without bias, norm, leaky ReLU; keeps the size at stride 1."""
    conv = Conv2d(
        in_channels,
        out_channels,
        kernel_size,
        stride=stride,
        padding=kernel_size // 2,
        bias=False,
        norm=get_norm(norm, out_channels),
        activation=nn.LeakyReLU(0.1, inplace=True),
    )
    nn.init.kaiming_normal_(conv.weight, a=0.1, mode="fan_out", nonlinearity="leaky_relu")
    return conv


class DarkNetBlock(nn.Module):
    """1x1 to half the width, 3x3 back, plus the input; no activation after the sum."""

    def __init__(self, channels: int, *, norm: str):
        super().__init__()
        self.conv1 = _conv(channels, channels // 2, 1, norm=norm)
        self.conv2 = _conv(channels // 2, channels, 3, norm=norm)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.conv1(x))


class DarkNet(Backbone):
    """A stem and the stages "res1" to "res5" at strides 2 to 32, named like those of ResNets.

    A stage is a 3x3 convolution of stride 2 that doubles the width, then residual blocks.
    """

    def __init__(
        self,
        *,
        out_features: list[str],
        stem_channels: int = 32,
        norm: str = "BN",
        freeze_at: int = 0,
    ):
        """
        Args:
            out_features: some of "res1" to "res5"; stages after the last of them are not built.
            stem_channels: width of the stem; the stages are 2 to 32 times as wide.
            norm: see ``detectron2.layers.get_norm``.
            freeze_at: freeze the stem (1 or more) and the stages up to "res<freeze_at>"; 0: none.

        Raises:
            ValueError: an option has an unsupported value.
        """
        super().__init__()
        names = [*_BLOCKS]
        check_stages(out_features, names, freeze_at)
        self._out_features = list(out_features)
        self._out_feature_channels = {}
        self._out_feature_strides = {}

        self.stem = _conv(3, stem_channels, 3, norm=norm)
        self.stage_names = names[: 1 + max(map(names.index, out_features))]
        for i, name in enumerate(self.stage_names):
            width = stem_channels * 2**i
            entry = _conv(width, 2 * width, 3, norm=norm, stride=2)
            blocks = [DarkNetBlock(2 * width, norm=norm) for _ in range(_BLOCKS[name])]
            self.add_module(name, nn.Sequential(entry, *blocks))
            self._out_feature_channels[name] = 2 * width
            self._out_feature_strides[name] = 2 ** (i + 1)
        if freeze_at:
            for name in ("stem", *self.stage_names[:freeze_at]):
                freeze(getattr(self, name))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(N, 3, H, W) -> a map (N, C, ceil(H / stride), ceil(W / stride)) per output."""
        x = self.stem(x)
        outputs = {}
        for name in self.stage_names:
            x = getattr(self, name)(x)
            if name in self._out_features:
                outputs[name] = x
        return outputs


@register_backbone
def build_darknet_backbone(cfg, input_shape: ShapeSpec) -> DarkNet:
    """DarkNet-53 from ``cfg.MODEL.DARKNET`` and ``cfg.MODEL.BACKBONE.FREEZE_AT``."""
    return DarkNet(
        out_features=cfg.MODEL.DARKNET.OUT_FEATURES, freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT
    )
