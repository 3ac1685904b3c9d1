"""Deformable convolution, v1 (arXiv 1703.06211) and modulated v2 (arXiv 1811.11168)."""

from collections.abc import Callable

import torch
from detectron2.layers import Conv2d
from torch import Tensor, nn
from torchvision.ops import deform_conv2d


class DeformConv2d(Conv2d):
    """A ``Conv2d`` that samples its input at predicted offsets.

    It uses torchvision's operator, because Detectron2's own needs its compiled extension. The
    convolution ``offset`` predicts (dy, dx) per kernel position; v2 adds a mask logit per position,
    after all offsets. Its weights start at zero, so that the layer starts as a plain convolution
    (v2: multiplied by one half).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        modulated: bool = False,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        norm: nn.Module | None = None,
        activation: Callable[[Tensor], Tensor] | None = None,
    ):
        """
        Args:
            modulated: v2.
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, norm,
                activation: see ``detectron2.layers.Conv2d``.
        """
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            norm=norm,
            activation=activation,
        )
        self.modulated = modulated
        positions = self.kernel_size[0] * self.kernel_size[1]
        self.offset = nn.Conv2d(
            in_channels,
            positions * (3 if modulated else 2),
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
        )
        nn.init.zeros_(self.offset.weight)
        nn.init.zeros_(self.offset.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, out_channels, H', W')."""
        return self.sample(x, self.offset(x))

    def sample(self, x: Tensor, offset: Tensor) -> Tensor:
        """``forward``, given the output of the offset convolution."""
        mask = None
        if self.modulated:
            positions = self.kernel_size[0] * self.kernel_size[1]
            offset, mask = offset.split([2 * positions, positions], dim=1)
            mask = mask.float().sigmoid()
        # the operator needs one dtype for all tensors: float32, regardless of autocast
        with torch.autocast(x.device.type, enabled=False):
            out = deform_conv2d(
                x.float(),
                offset.float(),
                self.weight.float(),
                None if self.bias is None else self.bias.float(),
                self.stride,
                self.padding,
                self.dilation,
                mask,
            )
        out = out.to(x.dtype)
        if self.norm is not None:
            out = self.norm(out)
        return out if self.activation is None else self.activation(out)
