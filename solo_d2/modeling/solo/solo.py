"""SOLO: Segmenting Objects by Locations (arXiv 1912.04488)."""

from typing import Any, NamedTuple

from detectron2.modeling import META_ARCH_REGISTRY
from torch import Tensor, nn

from solo_d2.layers.coord import append_coordinates
from solo_d2.layers.resample import UpsampledConv2d, resize

from .base import SOLOFamily
from .head import CategoryHead, HeadSpec, init_output


class SOLOOutputs(NamedTuple):
    """Raw outputs for N images; lists have one entry per level, tuples one per image."""

    category_logits: list[Tensor]  # (N, C, S, S)
    # The last maps before the output convs, which are evaluated for chosen cells only: all S * S
    # channels at twice the level's size would be the largest tensors of the model.
    mask_features: list[tuple[Tensor, ...]]  # (D, h, w), not negative


@META_ARCH_REGISTRY.register()
class SOLO(SOLOFamily):
    """A cell's mask is an output channel of its own (figure 2 of the paper)."""

    one_mask_per_cell = True

    @classmethod
    def from_config(cls, cfg) -> dict[str, Any]:
        options = super().from_config(cfg)
        shapes = options["backbone"].output_shape()
        head = SOLOHead(HeadSpec.from_config(cfg, shapes, options["num_classes"]))
        return {**options, "head": head}

    def predict_levels(self, levels: list[Tensor], features: dict[str, Tensor]) -> SOLOOutputs:
        category_logits, mask_features = self.head(levels)
        return SOLOOutputs(category_logits, [feature.unbind() for feature in mask_features])

    def soft_masks(
        self,
        outputs: SOLOOutputs,
        image: int,
        level: int,
        cells: Tensor,
        size: tuple[int, int] | None = None,
    ) -> Tensor:
        logits = self.head.mask_pred[level].select(outputs.mask_features[level][image], cells)
        return resize(logits.sigmoid()[:, None], size or logits.shape[-2:])[:, 0]


class SOLOHead(CategoryHead):
    """Category tower on S x S grids, mask tower on the feature maps, an output conv per level."""

    def __init__(self, spec: HeadSpec):
        super().__init__(spec)
        self.axes = "xy" if spec.coord_conv else ""
        self.mask_tower = spec.tower.build(spec.in_channels + len(self.axes))
        self.mask_pred = nn.ModuleList(
            init_output(
                UpsampledConv2d(spec.tower.conv_dim, grid * grid, kernel_size=1), self.prior_bias
            )
            for grid in spec.num_grids
        )

    def forward(self, levels: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """
        Args:
            levels: (N, in_channels, h, w) per level.

        Returns:
            Per level category logits (N, C, S, S) and mask features (N, D, h, w), from which
            ``mask_pred`` makes a mask (2h, 2w) per cell. D is ``tower.conv_dim``.
        """
        mask_features = [self.mask_tower(append_coordinates(x, self.axes)) for x in levels]
        return self.classify(levels), mask_features
