"""Resizing feature maps."""

import torch.nn.functional as F
from detectron2.layers import Conv2d
from torch import Tensor

from .symbolic import same_size


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear resize with half-pixel centers; returns x itself if it already has the size.

    Args:
        x: (N, C, h, w); N may be 0, C may not.
        size: height and width of the result.
    """
    if same_size(x.shape[-2:], size):
        return x
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def upsample2x(x: Tensor) -> Tensor:
    """(N, C, h, w) -> (N, C, 2h, 2w), bilinear."""
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


ALIGNMENTS = {
    "interpolate": lambda x, grid: resize(x, (grid, grid)),
    "adaptive_pool": lambda x, grid: F.adaptive_max_pool2d(x, grid),
    "region_grid": lambda x, grid: F.avg_pool2d(resize(x, (2 * grid, 2 * grid)), 2),
}


def align_to_grid(feature: Tensor, grid: int, method: str = "interpolate") -> Tensor:
    """One vector per cell of a grid over the map (SOLO, section 3.3.1).

    Args:
        feature: (N, C, H, W).
        grid: S, cells along each axis.
        method: "interpolate" (a bilinear sample at the center of each cell), "adaptive_pool" (the
            maximum over the cell) or "region_grid" (the mean of 2 x 2 samples spread evenly over
            the cell).

    Returns:
        (N, C, S, S).
    """
    return ALIGNMENTS[method](feature, grid)


class UpsampledConv2d(Conv2d):
    """Upsamples its input to twice the size, then convolves it.

    ``forward`` computes all output channels, ``select`` only the requested ones. ``select``
    convolves before it upsamples, which gives the same result because both are linear. So neither
    the larger input nor the other channels are computed, not even in the backward pass.
    """

    def __init__(self, in_channels: int, out_channels: int, *, kernel_size: int):
        """
        Args:
            in_channels, out_channels: see ``Conv2d``.
            kernel_size: odd.
        """
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, h, w) -> (N, out_channels, 2h, 2w)."""
        return super().forward(upsample2x(x))

    def select(self, x: Tensor, channels: Tensor) -> Tensor:
        """The requested output channels of one image.

        Args:
            x: (in_channels, h, w).
            channels: (n,) indices. With n = 0 the result is still connected to x and the weights.

        Returns:
            (n, 2h, 2w) float32.
        """
        (h, w), k = x.shape[-2:], self.kernel_size[0]
        # a convolution reads around each position, fold writes around it: mirror the kernel
        kernels = self.weight.index_select(0, channels).flip(2, 3).permute(0, 2, 3, 1)
        # the contribution of each kernel position, as maps of the input's size
        maps = (kernels.flatten(0, 2) @ x.flatten(1)).float().view(-1, k * k, h, w)
        maps = upsample2x(maps)
        if k > 1:
            maps = F.fold(maps.flatten(2), (2 * h, 2 * w), k, padding=k // 2)
        return maps[:, 0] + self.bias.index_select(0, channels).float().view(-1, 1, 1)
