"""YOLACT's feature pyramid."""

import math

from detectron2.layers import Conv2d, ShapeSpec, get_norm
from torch import Tensor, nn

from solo_d2.layers.resample import resize


def xavier_conv(
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    *,
    stride: int = 1,
    padding: int | None = None,
    relu: bool = False,
    gain: float = 1.0,
    norm: str = "",
) -> Conv2d:
    """A convolution as all of YOLACT's own start: Xavier-uniform, bias zero.

    ``padding`` is half of the kernel unless given; ``gain`` is a factor on the weights; ``norm``
    takes the place of the bias.
    """
    conv = Conv2d(
        in_channels,
        out_channels,
        kernel_size,
        stride=stride,
        padding=kernel_size // 2 if padding is None else padding,
        bias=not norm,
        norm=get_norm(norm, out_channels),
        activation=nn.ReLU(inplace=True) if relu else None,
    )
    nn.init.xavier_uniform_(conv.weight, gain)
    if not norm:
        nn.init.zeros_(conv.bias)
    return conv


class YOLACTPyramid(nn.Module):
    """P3 to P7 from C3 to C5.

    Unlike in Detectron2's ``FPN``, a coarser map is resized to the exact size of the finer one,
    whatever that is, P3 to P5 go through ReLUs, and no ReLU is between P5, P6 and P7.
    """

    def __init__(
        self,
        input_shape: dict[str, ShapeSpec],
        *,
        in_features: list[str],
        out_channels: int,
        num_levels: int,
        norm: str = "",
    ):
        """
        Args:
            input_shape: of the backbone.
            in_features: finest first, strides doubling.
            out_channels: of all levels.
            num_levels: at least as many as ``in_features``; the others are strided convolutions of
                the level before.
            norm: after each convolution; see ``detectron2.layers.get_norm``.

        Raises:
            ValueError: a feature is missing, or the strides or the number of levels do not do.
        """
        super().__init__()
        missing = [name for name in in_features if name not in input_shape]
        if missing or not in_features:
            raise ValueError(
                f"MODEL.YOLACT.IN_FEATURES must be some of {sorted(input_shape)}, "
                f"not {[*in_features]}"
            )
        strides = [input_shape[name].stride for name in in_features]
        if strides != [strides[0] * 2**i for i in range(len(strides))]:
            raise ValueError(f"MODEL.YOLACT.IN_FEATURES needs strides that double, not {strides}")
        if num_levels < len(in_features):
            raise ValueError(
                f"MODEL.YOLACT.ANCHOR_SIZES needs an entry for each of {[*in_features]}, "
                f"and has {num_levels}"
            )
        self.in_features = in_features
        first = int(math.log2(strides[0]))
        self.laterals, self.outputs, self.downsamples = [], [], []
        for k, name in enumerate(in_features, first):
            self.laterals.append(f"lateral{k}")
            self.outputs.append(f"output{k}")
            channels = input_shape[name].channels
            self.add_module(f"lateral{k}", xavier_conv(channels, out_channels, 1, norm=norm))
            output = xavier_conv(out_channels, out_channels, 3, relu=True, norm=norm)
            self.add_module(f"output{k}", output)
        for k in range(first + len(in_features), first + num_levels):
            self.downsamples.append(f"downsample{k}")
            downsample = xavier_conv(out_channels, out_channels, 3, stride=2, norm=norm)
            self.add_module(f"downsample{k}", downsample)

    def forward(self, features: dict[str, Tensor]) -> list[Tensor]:
        """Features of the backbone -> (N, C, h, w) per level, finest first."""
        maps: list[Tensor] = []
        for name, lateral in zip(reversed(self.in_features), reversed(self.laterals)):
            x = getattr(self, lateral)(features[name])
            if maps:
                x = x + resize(maps[0], x.shape[-2:])
            maps.insert(0, x)
        levels = [getattr(self, output)(x) for output, x in zip(self.outputs, maps)]
        for downsample in self.downsamples:
            levels.append(getattr(self, downsample)(levels[-1]))
        return levels
