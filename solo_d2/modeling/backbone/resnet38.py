"""ResNet-38 (wide, pre-activation; arXiv 1611.10080) as EPS and other weakly supervised methods
use it: output stride 8, frozen batch norms."""

from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import Backbone
from torch import Tensor, nn
from torch.nn import functional as F

from .registry import check_freeze_at, register_backbone

# blocks, channels within and after a block, stride, dilation; in multiples of the stem's channels
_STAGES = {
    "res2": (3, 2, 2, 2, 1),
    "res3": (3, 4, 4, 2, 1),
    "res4": (6, 8, 8, 2, 1),
    "res5": (3, 8, 16, 1, 2),
}
# channels in the first, second and third convolution, dropout
_BOTTLENECKS = {"res6": (8, 16, 32, 0.3), "res7": (16, 32, 64, 0.5)}


def _conv(inputs: int, outputs: int, side: int, stride: int = 1, dilation: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, side, stride, dilation * (side // 2), dilation, bias=False)


class PreActivationBlock(nn.Module):
    """Norm, ReLU and convolution, several times, plus a shortcut.

    The shortcut is the input, or a 1x1 convolution of the first ReLU if the shape changes.
    """

    def __init__(self, convs: list[nn.Conv2d], *, dropout: float = 0.0):
        """
        Args:
            convs: of the block, in order; only the first may have a stride.
            dropout: probability for whole channels, before each convolution but the first.
        """
        super().__init__()
        self.norms = nn.ModuleList(FrozenBatchNorm2d(conv.in_channels) for conv in convs)
        self.convs = nn.ModuleList(convs)
        self.dropout = nn.Dropout2d(dropout)
        inputs, outputs, stride = convs[0].in_channels, convs[-1].out_channels, convs[0].stride[0]
        changes = inputs != outputs or stride != 1
        self.shortcut = _conv(inputs, outputs, 1, stride) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norms[0](x))
        shortcut = x if self.shortcut is None else self.shortcut(y)
        y = self.convs[0](y)
        for norm, conv in zip(self.norms[1:], self.convs[1:]):
            y = conv(self.dropout(F.relu(norm(y))))
        return shortcut + y


class ResNet38(Backbone):
    """A stem and the stages "res2" to "res7"; the output is "res7" at stride 8."""

    def __init__(self, *, stem_channels: int = 64, freeze_at: int = 2):
        """
        Args:
            stem_channels: width of the stem; that of the output is 64 times as large.
            freeze_at: freeze the stem (1) and the stages up to "res<freeze_at>"; 0 freezes none.
                All batch norms are frozen anyway.

        Raises:
            ValueError: ``freeze_at`` has an unsupported value.
        """
        super().__init__()
        check_freeze_at(freeze_at)
        width = channels = stem_channels
        self.stem = _conv(3, width, 3)
        for name, (count, mid, out, stride, dilation) in _STAGES.items():
            blocks = []
            for i in range(count):
                # the first convolution with a new dilation still has the previous one
                first = _conv(channels, mid * width, 3, 1 if i else stride, dilation if i else 1)
                channels = out * width
                second = _conv(mid * width, channels, 3, 1, dilation)
                blocks.append(PreActivationBlock([first, second]))
            self.add_module(name, nn.Sequential(*blocks))
        for name, (first, mid, out, dropout) in _BOTTLENECKS.items():
            convs = [
                _conv(channels, first * width, 1),
                _conv(first * width, mid * width, 3, 1, 4),
                _conv(mid * width, out * width, 1),
            ]
            self.add_module(name, nn.Sequential(PreActivationBlock(convs, dropout=dropout)))
            channels = out * width
        self.norm = FrozenBatchNorm2d(channels)
        self._out_features = ["res7"]
        self._out_feature_channels = {"res7": channels}
        self._out_feature_strides = {"res7": 8}
        if freeze_at >= 1:
            for name in ("stem", *[*_STAGES][: freeze_at - 1]):
                getattr(self, name).requires_grad_(False)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(N, 3, H, W) -> {"res7": (N, C, ceil(H / 8), ceil(W / 8))}."""
        x = self.stem(x)
        for name in (*_STAGES, *_BOTTLENECKS):
            x = getattr(self, name)(x)
        return {"res7": F.relu(self.norm(x))}


@register_backbone
def build_resnet38_backbone(cfg, input_shape: ShapeSpec) -> ResNet38:
    """ResNet-38; ``cfg.MODEL.BACKBONE.FREEZE_AT`` is 2 in the published recipe."""
    return ResNet38(freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT)
