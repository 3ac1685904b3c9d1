"""Coordinate maps for CoordConv (arXiv 1807.03247)."""

import torch
from torch import Tensor

from .symbolic import larger


def append_coordinates(feature: Tensor, axes: str = "xy") -> Tensor:
    """Append channels with coordinates that run from -1 to 1 over the map, both ends exact.

    Args:
        feature: (N, C, H, W).
        axes: "xy", "x" (varies along the columns), "y" (along the rows), or "" for none.

    Returns:
        (N, C + len(axes), H, W): the feature, then the coordinates in the given order.
    """
    n, _, h, w = feature.shape
    maps = {"x": _steps(w, feature).view(1, 1, 1, w), "y": _steps(h, feature).view(1, 1, h, 1)}
    return torch.cat([feature, *(maps[axis].expand(n, 1, h, w) for axis in axes)], dim=1)


def _steps(size: int, like: Tensor) -> Tensor:
    """As linspace(-1, 1, size), which would become a constant in an exported graph."""
    index = torch.arange(size, dtype=torch.float32, device=like.device)
    return (2 * index / larger(size - 1, 1) - 1).to(like.dtype)
