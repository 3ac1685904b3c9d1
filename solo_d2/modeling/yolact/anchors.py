"""Anchors, and the encoding of boxes relative to them.

Inside YOLACT, boxes are *relative*: pixels of the padded network input, divided by the input's
longer side. In a square input they range from 0 to 1 along both axes, as in the published code. In
other inputs both axes have the same unit, so an anchor has the same size in pixels in every batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from solo_d2.layers.symbolic import larger

from ..options import check_at_least

# Scales of the encoded center and size (the "variances" of SSD).
_CENTER_SCALE, _SIZE_SCALE = 0.1, 0.2
# Maximum decoded log of a box's side over its anchor's; keeps boxes finite if training diverges.
_MAX_LOG_SIZE = 10.0


@dataclass(frozen=True, kw_only=True)
class AnchorGenerator:
    """The anchors of all levels for an input size.

    Attributes:
        sizes: the smallest anchor's side per level, in pixels of the network's input.
        per_octave: scales per level, spread evenly over one octave.
        aspect_ratios: width over height.
        square: make the height equal to the width, as the published code did by mistake. The
            weights of YOLACT need it, those of YOLACT++ do not.

    Raises:
        ValueError: an option has an unsupported value.
    """

    sizes: Sequence[float]
    per_octave: int = 1
    aspect_ratios: Sequence[float]
    square: bool = True

    def __post_init__(self) -> None:
        check_at_least(1, per_octave=self.per_octave)
        for name in ("sizes", "aspect_ratios"):
            values = tuple(getattr(self, name))
            if not values or min(values) <= 0:
                raise ValueError(f"{name} must be positive numbers, not {[*values]}")
            object.__setattr__(self, name, values)  # hashable

    @property
    def scales(self) -> list[list[float]]:
        """Per level, the sides of its anchors."""
        octave = [2 ** (i / self.per_octave) for i in range(self.per_octave)]
        return [[size * factor for factor in octave] for size in self.sizes]

    @property
    def num_levels(self) -> int:
        return len(self.sizes)

    @property
    def num_anchors(self) -> int:
        """A, at each location."""
        return self.per_octave * len(self.aspect_ratios)

    def __call__(
        self,
        level_sizes: list[tuple[int, int]],
        input_size: tuple[int, int],
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """
        Args:
            level_sizes: height and width of each level's map.
            input_size: height and width of the network's input.
            device: device of the result.

        Returns:
            (P, 4) float32, center x, center y, width, height, relative; not clipped. In the order
            level, row, column, scale, aspect ratio. Do not modify it: all calls share it.
        """
        traced = torch.jit.is_tracing() or torch.compiler.is_compiling()
        make = _make_anchors if traced else _cached_anchors
        return make(self, tuple(level_sizes), input_size, device)


def _make_anchors(
    options: AnchorGenerator,
    level_sizes: tuple[tuple[int, int], ...],
    input_size: tuple[int, int],
    device: torch.device | str,
) -> Tensor:
    """The result of ``AnchorGenerator``, computed on the CPU."""
    unit = larger(*input_size)
    # float64, and rounded once at the end, as in the published code
    exact = {"dtype": torch.float64, "device": "cpu"}
    levels = []
    # outside of inference mode, so that training can use the same table
    with torch.inference_mode(False):
        roots = torch.tensor(options.aspect_ratios, **exact).sqrt()
        for (height, width), sides in zip(level_sizes, options.scales, strict=True):
            y = (torch.arange(height, **exact) + 0.5) / height * (input_size[0] / unit)
            x = (torch.arange(width, **exact) + 0.5) / width * (input_size[1] / unit)
            side = torch.tensor(sides, **exact)[:, None]
            w = (side * roots / unit).flatten()
            h = w if options.square else (side / roots / unit).flatten()
            fields = torch.broadcast_tensors(x[None, :, None], y[:, None, None], w, h)
            levels.append(torch.stack(fields, dim=-1).view(-1, 4))
        return torch.cat(levels).float().to(device)


_cached_anchors = lru_cache(maxsize=16)(_make_anchors)


def to_corners(boxes: Tensor) -> Tensor:
    """(..., 4) center x, center y, width, height -> x1, y1, x2, y2."""
    center, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([center - half, center + half], dim=-1)


def encode(boxes: Tensor, anchors: Tensor) -> Tensor:
    """The regression targets of boxes.

    Like Detectron2's ``Box2BoxTransform`` with weights (10, 10, 5, 5), but computed from the
    anchors' centers and sizes instead of their corners, which rounds differently.

    Args:
        boxes: (R, 4) x1, y1, x2, y2 of positive width and height, relative.
        anchors: (R, 4) center x, center y, width, height, relative.

    Returns:
        (R, 4) offsets of the center and logarithms of the size.
    """
    center = (boxes[:, :2] + boxes[:, 2:]) / 2
    offset = (center - anchors[:, :2]) / (_CENTER_SCALE * anchors[:, 2:])
    size = ((boxes[:, 2:] - boxes[:, :2]) / anchors[:, 2:]).log() / _SIZE_SCALE
    return torch.cat([offset, size], dim=1)


def decode(offsets: Tensor, anchors: Tensor) -> Tensor:
    """The inverse of ``encode``: (R, 4) x1, y1, x2, y2, relative, not clipped."""
    size = anchors[:, 2:] * (offsets[:, 2:] * _SIZE_SCALE).clamp(max=_MAX_LOG_SIZE).exp()
    top_left = anchors[:, :2] + offsets[:, :2] * _CENTER_SCALE * anchors[:, 2:] - size / 2
    return torch.cat([top_left, top_left + size], dim=1)
