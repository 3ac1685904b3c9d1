"""The U-Net of the published toy models of AdaptIS (arXiv 1909.07829)."""

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from torch import Tensor, nn
from torch.nn import functional as F

from .registry import register_backbone


class AdaptISUNet(Backbone):
    """An encoder of convolutions and max pooling, a decoder with learned bilinear upsampling.

    It accepts images of any size: pooling rounds up, and maps are cropped where sizes differ. Its
    only output, "unet", has the size of the image.
    """

    def __init__(
        self, *, in_channels: int = 3, width: int = 32, max_width: int = 512, num_levels: int = 5
    ):
        """
        Args:
            in_channels: channels of the image.
            width: channels of the finest level and of the output; they double with each level.
            max_width: maximum number of channels.
            num_levels: number of map sizes in the encoder.
        """
        super().__init__()
        widths = [min(width * 2**i, max_width) for i in range(num_levels)]
        self.input_norm = nn.BatchNorm2d(in_channels)
        self.encoder = nn.ModuleList(
            _block_pair(a, b) for a, b in zip([in_channels, *widths], widths)
        )
        self.decoder = nn.ModuleList()
        for i in reversed(range(num_levels - 1)):
            # the input is as wide as this level, or twice as wide
            incoming = widths[-1] if i == num_levels - 2 else widths[i]
            self.decoder.append(UpBlock(incoming, widths[i], widths[i - 1] if i > 0 else widths[0]))
        self.final = _block_pair(widths[0], widths[0])
        self._out_features = ["unet"]
        self._out_feature_channels = {"unet": widths[0]}
        self._out_feature_strides = {"unet": 1}
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_normal_(module.weight)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(N, in_channels, H, W) -> {"unet": (N, width, H, W)}."""
        x = self.input_norm(x)
        skips: list[Tensor] = []
        for level in self.encoder:
            if skips:
                x = F.max_pool2d(x, 2, ceil_mode=True)
            x = level(x)
            skips.append(x)
        for block, skip in zip(self.decoder, skips[-2::-1]):
            x = block(x, skip)
        return {"unet": self.final(x)}


class ConvReLUBN(nn.Conv2d):
    """3x3 convolution without bias, ReLU, batch norm."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(F.relu_(super().forward(x)))


class UpBlock(nn.Module):
    """Double the size, concatenate the skip connection, two convolutions."""

    def __init__(self, in_channels: int, channels: int, out_channels: int):
        """
        Args:
            in_channels: a multiple of ``channels``: each upsampled channel sums a group of them.
            channels: channels of the skip connection.
            out_channels: channels of the result.
        """
        super().__init__()
        self.upsample = nn.ConvTranspose2d(
            in_channels, channels, 4, stride=2, padding=1, groups=channels, bias=False
        )
        self.conv0 = ConvReLUBN(2 * channels, channels)
        self.conv1 = ConvReLUBN(channels, out_channels)
        taps = torch.tensor([0.25, 0.75, 0.75, 0.25])
        with torch.no_grad():
            self.upsample.weight.copy_(taps[:, None] * taps)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """(N, in_channels, h, w) and (N, channels, H, W) -> (N, out_channels, H', W')."""
        x = F.relu_(self.upsample(x))
        # each axis separately; the published code crops both or none
        size = (min(x.shape[-2], skip.shape[-2]), min(x.shape[-1], skip.shape[-1]))
        x = torch.cat([_center_crop(x, size), _center_crop(skip, size)], dim=1)
        return self.conv1(self.conv0(x))


def _block_pair(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        ConvReLUBN(in_channels, out_channels), ConvReLUBN(out_channels, out_channels)
    )


def _center_crop(x: Tensor, size: tuple[int, int]) -> Tensor:
    top, left = (x.shape[-2] - size[0]) // 2, (x.shape[-1] - size[1]) // 2
    return x[:, :, top : top + size[0], left : left + size[1]]


@register_backbone
def build_adaptis_unet_backbone(cfg, input_shape: ShapeSpec) -> AdaptISUNet:
    """The U-Net from ``cfg.MODEL.UNET``."""
    options = cfg.MODEL.UNET
    return AdaptISUNet(
        in_channels=input_shape.channels,
        width=options.WIDTH,
        num_levels=options.LEVELS,
    )
