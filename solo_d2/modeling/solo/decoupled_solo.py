"""Decoupled SOLO and its light version (arXiv 1912.04488, section 5.1)."""

from typing import Any, NamedTuple

import numpy as np
import torch
from detectron2.modeling import META_ARCH_REGISTRY
from torch import Tensor, nn

from solo_d2.layers.coord import append_coordinates
from solo_d2.layers.resample import UpsampledConv2d, resize
from solo_d2.layers.upload import upload

from .base import Levels, Size, SOLOFamily
from .head import CategoryHead, HeadSpec, init_output


class DecoupledSOLOOutputs(NamedTuple):
    """Raw outputs for N images; lists have one entry per level, tuples one per image.

    The maps of columns (x) and rows (y) are made from the two features, which are the same tensors
    if the tower is shared.
    """

    category_logits: list[Tensor]  # (N, C, S, S)
    x_features: list[tuple[Tensor, ...]]  # (D, h, w), not negative
    y_features: list[tuple[Tensor, ...]]  # (D, h, w), not negative


@META_ARCH_REGISTRY.register()
class DecoupledSOLO(SOLOFamily):
    """A cell's mask is the product of its column's and its row's map: 2 S channels, not S * S."""

    one_mask_per_cell = True

    @classmethod
    def from_config(cls, cfg) -> dict[str, Any]:
        options = super().from_config(cfg)
        shapes = options["backbone"].output_shape()
        head = DecoupledSOLOHead(
            HeadSpec.from_config(cfg, shapes, options["assigner"].num_classes),
            shared_tower=cfg.MODEL.DECOUPLED_SOLO.SHARED_TOWER,
        )
        return {**options, "head": head}

    def predict_masks(
        self, category_logits: list[Tensor], levels: Levels, features: dict[str, Tensor]
    ) -> DecoupledSOLOOutputs:
        maps = [((), ()) if x is None else self.head.line_features(x) for x in levels]
        return DecoupledSOLOOutputs(category_logits, *([*axis] for axis in zip(*maps)))

    def soft_masks(
        self,
        outputs: DecoupledSOLOOutputs,
        image: int,
        level: int,
        cells: np.ndarray,
        size: Size = None,
    ) -> Tensor:
        grid = self.num_grids[level]
        lines = [  # cells share lines
            upload(torch.from_numpy(x), self.device)
            for line in (cells % grid, cells // grid)
            for x in np.unique(line, return_inverse=True)
        ]
        columns, column_of, rows, row_of = lines
        x, y = self.line_maps(outputs, image, level, columns, rows, size)
        return x.index_select(0, column_of) * y.index_select(0, row_of)

    def line_maps(
        self,
        outputs: DecoupledSOLOOutputs,
        image: int,
        level: int,
        columns: Tensor,
        rows: Tensor,
        size: Size = None,
    ) -> tuple[Tensor, Tensor]:
        """Soft maps (n, H, W) of columns and of rows of a grid; arguments as ``soft_masks``."""

        def maps(feature: Tensor, conv: UpsampledConv2d, lines: Tensor) -> Tensor:
            logits = conv.select(feature, lines)
            # each map is resized separately, as published: the product of two resized maps differs
            # from the resized product
            return resize(logits.sigmoid()[:, None], size or logits.shape[-2:])[:, 0]

        return (
            maps(outputs.x_features[level][image], self.head.x_pred[level], columns),
            maps(outputs.y_features[level][image], self.head.y_pred[level], rows),
        )


class DecoupledSOLOHead(CategoryHead):
    """Adds towers for columns and rows, or one for both (Light), and output convs per level."""

    def __init__(self, spec: HeadSpec, *, shared_tower: bool = False):
        """
        Args:
            spec: see ``HeadSpec``.
            shared_tower: make the maps of columns and rows from the same features.
        """
        super().__init__(spec)
        coordinates = int(spec.coord_conv)
        if shared_tower:
            self.mask_tower = spec.tower.build(spec.in_channels + 2 * coordinates)
        else:
            self.x_tower = spec.tower.build(spec.in_channels + coordinates)
            self.y_tower = spec.tower.build(spec.in_channels + coordinates)
        self.shared_tower = shared_tower
        self.x_pred, self.y_pred = (self._output_convs(spec.tower.conv_dim) for _ in "xy")

    def _output_convs(self, in_channels: int) -> nn.ModuleList:
        return nn.ModuleList(
            init_output(UpsampledConv2d(in_channels, grid, kernel_size=3), self.prior_bias)
            for grid in self.num_grids
        )

    def line_features(self, level: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """(N, in_channels, h, w) -> per image features (D, h, w) of columns, and of rows.

        ``x_pred`` and ``y_pred`` make S maps (2h, 2w) from them. D is ``tower.conv_dim``.
        """
        if self.shared_tower:
            both = self._run(self.mask_tower, level, "xy")
            return both, both
        return self._run(self.x_tower, level, "x"), self._run(self.y_tower, level, "y")

    def _run(self, tower: nn.Sequential, level: Tensor, axes: str) -> tuple[Tensor, ...]:
        return tower(append_coordinates(level, axes if self.coord_conv else "")).unbind()
