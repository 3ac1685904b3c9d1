"""Anchors, called priors in SSD and YOLACT, and how boxes are told relative to them.

The frame of all of YOLACT's boxes is *relative*: pixels of the network's input, padding included,
over its longer side. In a square input that is 0 to 1 along both axes, as in the published code;
in others both axes still have the same unit, so that an anchor has its size in pixels whatever the
shape of the image or of the batch.
"""

import torch
from torch import Tensor

# How far offsets are from 1 in the units of an anchor ("variances" of SSD).
_CENTER_SCALE, _SIZE_SCALE = 0.1, 0.2
# Largest logarithm of a box's side over the anchor's: no diverged model makes infinite boxes.
_MAX_LOG_SIZE = 10.0


def level_scales(sizes: list[float], per_octave: int) -> list[list[float]]:
    """Per level the sides of its anchors in pixels: its size, and those up to an octave above."""
    return [[size * 2 ** (i / per_octave) for i in range(per_octave)] for size in sizes]


def make_priors(
    level_sizes: list[tuple[int, int]],
    input_size: tuple[int, int],
    *,
    scales: list[list[float]],
    aspect_ratios: list[float],
    square: bool,
    device: torch.device | str = "cpu",
) -> Tensor:
    """The anchors of all levels, in the order level, row, column, scale, aspect ratio.

    Args:
        level_sizes: height and width of each level's map.
        input_size: of the network's input, in pixels; with ``scales`` for 550 pixels, (550, 550).
        scales: per level, in pixels of the input.
        aspect_ratios: width over height.
        square: make the height equal to the width, as the published code did by mistake.
        device: of the result.

    Returns:
        (P, 4) float32, center x, center y, width, height, relative; not clipped.
    """
    unit = float(max(input_size))
    # rounded once, at the end, as the published code does
    exact = {"dtype": torch.float64, "device": device}
    roots = torch.tensor(aspect_ratios, **exact).sqrt()
    levels = []
    for (height, width), sides in zip(level_sizes, scales, strict=True):
        y = (torch.arange(height, **exact) + 0.5) / height * (input_size[0] / unit)
        x = (torch.arange(width, **exact) + 0.5) / width * (input_size[1] / unit)
        side = torch.tensor(sides, **exact)[:, None]
        w = (side * roots / unit).flatten()
        h = w if square else (side / roots / unit).flatten()
        fields = torch.broadcast_tensors(x[None, :, None], y[:, None, None], w, h)
        levels.append(torch.stack(fields, dim=-1).view(-1, 4))
    return torch.cat(levels).float()


def to_corners(boxes: Tensor) -> Tensor:
    """(..., 4) center x, center y, width, height -> x1, y1, x2, y2."""
    center, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([center - half, center + half], dim=-1)


def encode(boxes: Tensor, priors: Tensor) -> Tensor:
    """What the head should predict.

    As Detectron2's ``Box2BoxTransform`` with weights (10, 10, 5, 5), but from the anchors' centers
    and sizes rather than from their corners, which rounds differently.

    Args:
        boxes: (N, 4) x1, y1, x2, y2 of positive width and height, relative.
        priors: (N, 4) center x, center y, width, height, relative.

    Returns:
        (N, 4) offsets of the center and logarithms of the size.
    """
    center = (boxes[:, :2] + boxes[:, 2:]) / 2
    offset = (center - priors[:, :2]) / (_CENTER_SCALE * priors[:, 2:])
    size = ((boxes[:, 2:] - boxes[:, :2]) / priors[:, 2:]).log() / _SIZE_SCALE
    return torch.cat([offset, size], dim=1)


def decode(offsets: Tensor, priors: Tensor) -> Tensor:
    """The inverse of ``encode``: (N, 4) x1, y1, x2, y2, relative, not clipped."""
    size = priors[:, 2:] * (offsets[:, 2:] * _SIZE_SCALE).clamp(max=_MAX_LOG_SIZE).exp()
    top_left = priors[:, :2] + offsets[:, :2] * _CENTER_SCALE * priors[:, 2:] - size / 2
    return torch.cat([top_left, top_left + size], dim=1)
