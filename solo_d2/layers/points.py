"""Reading feature maps at points, and coordinates relative to points."""

from itertools import product

import torch
from torch import Tensor


def read_at_points(feature: Tensor, points: Tensor, scale: float = 1.0) -> Tensor:
    """One vector per point, bilinear. The first cell's center is at 0, without half-pixel offset.

    Args:
        feature: (B, C, h, w).
        points: (B, N, 2) rows and columns in image pixels; clamped to the map.
        scale: cells per image pixel, 1 / stride.

    Returns:
        (B * N, C), image by image. No gradient flows to the points.
    """
    b, c, h, w = feature.shape
    axes = []
    for length, positions in zip((h, w), (points.detach().float() * scale).unbind(-1)):
        position = positions.clamp(min=0, max=length - 1)
        low = position.floor()
        fraction, high = position - low, (low + 1).clamp(max=length - 1)
        axes.append([(low.long(), 1 - fraction), (high.long(), fraction)])
    image = torch.arange(b, device=feature.device)[:, None]
    vectors = feature.new_zeros((), dtype=torch.float32)
    for (row, wr), (column, wc) in product(*axes):
        vectors = vectors + (wr * wc)[..., None] * feature[image, :, row, column]
    return vectors.reshape(-1, c).to(feature.dtype)


def relative_coordinates(
    points: Tensor,
    size: tuple[int, int],
    *,
    radius: float,
    scale: float = 1.0,
    append_distance: bool = True,
) -> Tensor:
    """Offsets of every cell from each point, in units of ``radius``, clamped to [-1, 1].

    Args:
        points: (P, 2) rows and columns in image pixels.
        size: height and width of the map.
        radius: in image pixels.
        scale: cells per image pixel, 1 / stride.
        append_distance: add the Euclidean distance, computed before the offsets are clamped.

    Returns:
        (P, 2 or 3, h, w) float32: row offset, column offset, distance.
    """
    offsets = [
        (torch.arange(n, dtype=torch.float32, device=points.device) - p[:, None] * scale)
        / (radius * scale)
        for n, p in zip(size, points.float().unbind(-1))
    ]
    shape = (points.shape[0], *size)
    rows, columns = offsets[0][:, :, None], offsets[1][:, None, :]
    maps = [rows.expand(shape), columns.expand(shape)]
    if append_distance:
        maps.append((rows**2 + columns**2).sqrt())
    return torch.stack(maps, dim=1).clamp_(-1, 1)
