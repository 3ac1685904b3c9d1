"""Decoupled SOLO and its light version (arXiv 1912.04488, section 5.1)."""

from typing import Any, NamedTuple

from detectron2.modeling import META_ARCH_REGISTRY
from torch import Tensor, nn

from solo_d2.layers.coord import append_coordinates
from solo_d2.layers.resample import UpsampledConv2d, resize

from .base import SOLOFamily
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
            HeadSpec.from_config(cfg, shapes, options["num_classes"]),
            shared_tower=cfg.MODEL.DECOUPLED_SOLO.SHARED_TOWER,
        )
        return {**options, "head": head}

    def predict_levels(
        self, levels: list[Tensor], features: dict[str, Tensor]
    ) -> DecoupledSOLOOutputs:
        category_logits, *features_of_axes = self.head(levels)
        x_features, y_features = ([x.unbind() for x in axis] for axis in features_of_axes)
        return DecoupledSOLOOutputs(category_logits, x_features, y_features)

    def soft_masks(
        self,
        outputs: DecoupledSOLOOutputs,
        image: int,
        level: int,
        cells: Tensor,
        size: tuple[int, int] | None = None,
    ) -> Tensor:
        grid = self.num_grids[level]
        columns, column_of = (cells % grid).unique(return_inverse=True)  # cells share lines
        rows, row_of = (cells // grid).unique(return_inverse=True)
        x, y = self.line_maps(outputs, image, level, columns, rows, size)
        return x.index_select(0, column_of) * y.index_select(0, row_of)

    def line_maps(
        self,
        outputs: DecoupledSOLOOutputs,
        image: int,
        level: int,
        columns: Tensor,
        rows: Tensor,
        size: tuple[int, int] | None = None,
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
    """Category tower on S x S grids; towers for columns and rows, or one for both (Light)."""

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

    def forward(self, levels: list[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """
        Args:
            levels: (N, in_channels, h, w) per level.

        Returns:
            Per level category logits (N, C, S, S) and the features (N, D, h, w) of columns and of
            rows, from which ``x_pred`` and ``y_pred`` make S maps (2h, 2w) each. D is
            ``tower.conv_dim``.
        """
        if self.shared_tower:
            x_features = y_features = self._run(self.mask_tower, levels, "xy")
        else:
            x_features = self._run(self.x_tower, levels, "x")
            y_features = self._run(self.y_tower, levels, "y")
        return self.classify(levels), x_features, y_features

    def _run(self, tower: nn.Sequential, levels: list[Tensor], axes: str) -> list[Tensor]:
        return [tower(append_coordinates(x, axes if self.coord_conv else "")) for x in levels]
