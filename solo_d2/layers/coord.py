"""Coordinate maps for CoordConv (arXiv 1807.03247)."""

import torch
from torch import Tensor


def append_coordinates(feature: Tensor) -> Tensor:
    """Append an x and a y channel that run from -1 to 1 over the map, both ends exact.

    Args:
        feature: (N, C, H, W).

    Returns:
        (N, C + 2, H, W): the feature, x (varies along the columns), y (along the rows).
    """
    n, _, h, w = feature.shape
    x = torch.linspace(-1, 1, w, dtype=feature.dtype, device=feature.device)
    y = torch.linspace(-1, 1, h, dtype=feature.dtype, device=feature.device)
    x = x.view(1, 1, 1, w).expand(n, 1, h, w)
    y = y.view(1, 1, h, 1).expand(n, 1, h, w)
    return torch.cat([feature, x, y], dim=1)
