"""VoVNetV2 (arXiv 1911.06667, section 3.3) as a bottom-up backbone."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling import Backbone
from torch import Tensor, nn
from torch.nn import functional as F

from solo_d2.layers.deform_conv import DeformConv2d
from solo_d2.layers.masks import chunk_length

from ..options import check_choice
from .registry import check_stages, freeze, register_backbone, register_pyramids


class VoVNetBody(NamedTuple):
    """Widths and depths of a VoVNet; tuples of four are for stage2 to stage5."""

    stem: tuple[int, ...]  # widths of its three convolutions
    inner: tuple[int, ...]  # widths of the 3x3 convolutions of the modules
    out: tuple[int, ...]  # widths of the stages
    layers: int  # 3x3 convolutions per module
    modules: tuple[int, ...]  # per stage
    depthwise: bool = False

    def scaled(self, factor: float) -> "VoVNetBody":
        """The same with all widths multiplied, to multiples of 8."""
        stem, inner, out = (
            tuple(max(8, round(width * factor / 8) * 8) for width in widths)
            for widths in (self.stem, self.inner, self.out)
        )
        return self._replace(stem=stem, inner=inner, out=out)


_STEM, _DW_STEM = (64, 64, 128), (64, 64, 64)
_INNER, _OUT = (128, 160, 192, 224), (256, 512, 768, 1024)
_SLIM_INNER, _SLIM_OUT = (64, 80, 96, 112), (112, 256, 384, 512)
BODIES = {
    "V-19-slim-dw-eSE": VoVNetBody(_DW_STEM, _SLIM_INNER, _SLIM_OUT, 3, (1, 1, 1, 1), True),
    "V-19-dw-eSE": VoVNetBody(_DW_STEM, _INNER, _OUT, 3, (1, 1, 1, 1), True),
    "V-19-slim-eSE": VoVNetBody(_STEM, _SLIM_INNER, _SLIM_OUT, 3, (1, 1, 1, 1)),
    "V-19-eSE": VoVNetBody(_STEM, _INNER, _OUT, 3, (1, 1, 1, 1)),
    "V-39-eSE": VoVNetBody(_STEM, _INNER, _OUT, 5, (1, 1, 2, 2)),
    "V-57-eSE": VoVNetBody(_STEM, _INNER, _OUT, 5, (1, 1, 4, 3)),
    "V-99-eSE": VoVNetBody(_STEM, _INNER, _OUT, 5, (1, 3, 9, 3)),
}
_STAGES = ("stage2", "stage3", "stage4", "stage5")


class EffectiveSqueezeExcitation(nn.Module):
    """eSE: scale each channel by a gate computed from the means of all channels."""

    def __init__(self, channels: int):
        super().__init__()
        self.fc = Conv2d(channels, channels, 1)

    def gate(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, 1, 1) in [0, 1]."""
        return F.hardsigmoid(self.fc(x.mean(dim=(2, 3), keepdim=True)))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x)


class DepthwiseSeparableConv(nn.Module):
    """A depthwise 3x3 convolution without norm or activation, then a 1x1 with norm and ReLU."""

    def __init__(self, in_channels: int, out_channels: int, *, stride: int = 1, norm: str):
        super().__init__()
        self.depthwise = Conv2d(
            in_channels, in_channels, 3, stride, padding=1, groups=in_channels, bias=False
        )
        self.pointwise = _conv(in_channels, out_channels, kernel_size=1, norm=norm)

    def forward(self, x: Tensor) -> Tensor:
        return self.pointwise(self.depthwise(x))


class OSAModule(nn.Module):
    """One-shot aggregation of a chain of 3x3 convolutions.

    The input and the outputs of all of them are concatenated, reduced by a 1x1 convolution and
    gated by eSE.
    """

    def __init__(
        self,
        in_channels: int,
        inner_channels: int,
        out_channels: int,
        *,
        num_layers: int,
        conv3x3: Callable[[int, int], nn.Module],
        norm: str,
        reduce: bool = False,
        identity: bool = False,
    ):
        """
        Args:
            in_channels, inner_channels, out_channels: channels of the input, the 3x3 convolutions,
                the output.
            num_layers: number of 3x3 convolutions.
            conv3x3: makes one of them from its numbers of channels.
            norm: see ``detectron2.layers.get_norm``.
            reduce: bring the chain's input to ``inner_channels`` by a 1x1 convolution.
            identity: add the input to the output; no activation follows.
        """
        super().__init__()
        self.identity = identity
        chain_in = inner_channels if reduce else in_channels
        self.reduction = (
            _conv(in_channels, inner_channels, kernel_size=1, norm=norm) if reduce else None
        )
        self.layers = nn.ModuleList(
            conv3x3(inner_channels if i else chain_in, inner_channels) for i in range(num_layers)
        )
        self.concat = _conv(
            in_channels + num_layers * inner_channels, out_channels, kernel_size=1, norm=norm
        )
        self.ese = EffectiveSqueezeExcitation(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, out_channels, H, W)."""
        maps = [x]
        y = x if self.reduction is None else self.reduction(x)
        for layer in self.layers:
            y = layer(y)
            maps.append(y)
        z = self.ese(self._reduce(maps))
        return z.add_(x) if self.identity else z

    def _reduce(self, maps: list[Tensor]) -> Tensor:
        """The 1x1 convolution of the concatenated maps; empties the list to release them.

        Without gradients, the CPU goes through strips of rows, which its caches hold: as a whole,
        the concatenation would be the largest tensor of the network.
        """
        n, _, _, width = maps[0].shape
        recorded = torch.jit.is_tracing() or torch.compiler.is_compiling()
        if torch.is_grad_enabled() or recorded or maps[0].device.type != "cpu":
            return self.concat(torch.cat(maps, dim=1))
        rows = chunk_length(4 * n * self.concat.in_channels * width)
        parts = zip(*(x.split(rows, dim=2) for x in maps))
        strips = [self.concat(torch.cat(part, dim=1)) for part in parts]
        maps.clear()
        return strips[0] if len(strips) == 1 else torch.cat(strips, dim=2)


class VoVNet(Backbone):
    """A stem at stride 4 and "stage2" to "stage5" at strides 4 to 32, of OSA modules each.

    Between the stages is a max pooling without padding that rounds up, so a side of n pixels
    becomes ceil((n - 3) / 2) + 1: half of an even one, less than half of an odd one.
    """

    def __init__(
        self,
        *,
        body: VoVNetBody,
        out_features: Sequence[str],
        in_channels: int = 3,
        norm: str = "FrozenBN",
        freeze_at: int = 0,
        deform_on_per_stage: Sequence[bool] = (False, False, False, False),
        deform_modulated: bool = False,
    ):
        """
        Args:
            body: one of ``BODIES``, or another body.
            out_features: some of "stem", "stage2" to "stage5"; stages after the last are not built.
            in_channels: channels of the image.
            norm: "FrozenBN", "BN", "SyncBN" or "GN".
            freeze_at: freeze the stem (1 or more) and the stages up to "stage<freeze_at>"; 0: none.
            deform_on_per_stage: deformable 3x3 convolutions in stage2..stage5 (not of "dw" bodies).
            deform_modulated: make them DCNv2.

        Raises:
            ValueError: an option has an unsupported value.
        """
        super().__init__()
        names = ["stem", *_STAGES]
        check_stages(out_features, names, freeze_at)
        check_choice("norm", norm, ("FrozenBN", "BN", "SyncBN", "GN"))
        odd = [width for width in (*body.stem, *body.inner, *body.out) if width % 32]
        if norm == "GN" and odd:
            raise ValueError(f"norm 'GN' has 32 groups, but this body has {odd[0]} channels")
        if len(deform_on_per_stage) != len(_STAGES):
            raise ValueError(
                f"deform_on_per_stage must have {len(_STAGES)} values, for stage2 to stage5, "
                f"not {len(deform_on_per_stage)}"
            )
        self._out_features = [name for name in names if name in out_features]
        self.stage_names = names[1 : 1 + names.index(self._out_features[-1])]

        conv3x3 = partial(DepthwiseSeparableConv if body.depthwise else _conv, norm=norm)
        deform3x3 = partial(_deform3x3, norm=norm, modulated=deform_modulated)
        first, second, channels = body.stem
        self.stem = nn.Sequential(
            OrderedDict(
                conv1=_conv(in_channels, first, stride=2, norm=norm),
                conv2=conv3x3(first, second),
                conv3=conv3x3(second, channels, stride=2),
            )
        )
        self._out_feature_channels = {"stem": channels}
        self._out_feature_strides = {"stem": 4}
        for i, name in enumerate(self.stage_names):
            deformable = deform_on_per_stage[i] and not body.depthwise
            conv = deform3x3 if deformable else conv3x3
            self.add_module(name, _stage(body, i, channels, conv, norm))
            channels = body.out[i]
            self._out_feature_channels[name] = channels
            self._out_feature_strides[name] = 4 * 2**i
        for module in self.modules():
            if isinstance(module, Conv2d):  # offset convolutions are not, and stay zero
                nn.init.kaiming_normal_(module.weight)
        for name in ["stem", *self.stage_names][:freeze_at]:
            freeze(getattr(self, name))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(N, in_channels, H, W) -> a map (N, C, about H / stride, W / stride) per output."""
        outputs = {}
        for name in ["stem", *self.stage_names]:
            if name in _STAGES[1:]:
                x = F.max_pool2d(x, kernel_size=3, stride=2, ceil_mode=True)
            x = getattr(self, name)(x)
            if name in self._out_features:
                outputs[name] = x
        return outputs


def _stage(
    body: VoVNetBody,
    index: int,
    in_channels: int,
    conv3x3: Callable[[int, int], nn.Module],
    norm: str,
) -> nn.Sequential:
    """The OSA modules "osa1", "osa2", ... of one stage; ``index`` 0 is stage2."""
    stage = nn.Sequential()
    for k in range(body.modules[index]):
        module = OSAModule(
            in_channels,
            body.inner[index],
            body.out[index],
            num_layers=body.layers,
            conv3x3=conv3x3,
            norm=norm,
            reduce=body.depthwise and in_channels != body.inner[index],
            identity=k > 0,  # a stage's first module changes the width
        )
        stage.add_module(f"osa{k + 1}", module)
        in_channels = body.out[index]
    return stage


def _deform3x3(in_channels: int, out_channels: int, *, norm: str, modulated: bool) -> nn.Module:
    """Deformable convolution without bias, norm, ReLU."""
    return DeformConv2d(
        in_channels,
        out_channels,
        modulated=modulated,
        kernel_size=3,
        padding=1,
        bias=False,
        norm=get_norm(norm, out_channels),
        activation=F.relu_,
    )


def _conv(
    in_channels: int, out_channels: int, *, kernel_size: int = 3, stride: int = 1, norm: str
) -> Conv2d:
    """Convolution without bias, norm, ReLU."""
    return Conv2d(
        in_channels,
        out_channels,
        kernel_size,
        stride,
        padding=kernel_size // 2,
        bias=False,
        norm=get_norm(norm, out_channels),
        activation=F.relu_,
    )


@register_backbone
def build_vovnet_backbone(cfg, input_shape: ShapeSpec) -> VoVNet:
    """VoVNetV2 from ``cfg.MODEL.VOVNET`` and ``cfg.MODEL.BACKBONE.FREEZE_AT``.

    Raises:
        ValueError: a key has an unsupported value; see also ``VoVNet``.
    """
    options = cfg.MODEL.VOVNET
    check_choice("MODEL.VOVNET.CONV_BODY", options.CONV_BODY, tuple(BODIES))
    return VoVNet(
        body=BODIES[options.CONV_BODY].scaled(options.WIDTH_MULT),
        out_features=options.OUT_FEATURES,
        in_channels=input_shape.channels,
        norm=options.NORM,
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
        deform_on_per_stage=options.STAGE_WITH_DCN,
        deform_modulated=options.WITH_MODULATED_DCN,
    )


register_pyramids(
    build_vovnet_backbone,
    fpn="build_vovnet_fpn_backbone",
    fcos_fpn="build_fcos_vovnet_fpn_backbone",
)
