"""SOLO: Segmenting Objects by Locations (arXiv 1912.04488)."""

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
        head = SOLOHead(HeadSpec.from_config(cfg, shapes, options["assigner"].num_classes))
        return {**options, "head": head}

    def predict_masks(
        self, category_logits: list[Tensor], levels: Levels, features: dict[str, Tensor]
    ) -> SOLOOutputs:
        maps = [() if x is None else self.head.mask_feature(x).unbind() for x in levels]
        return SOLOOutputs(category_logits, maps)

    def soft_masks(
        self, outputs: SOLOOutputs, image: int, level: int, cells: np.ndarray, size: Size = None
    ) -> Tensor:
        channels = upload(torch.from_numpy(cells), self.device)
        return self.channel_masks(outputs, image, level, channels, size)

    def channel_masks(
        self, outputs: SOLOOutputs, image: int, level: int, channels: Tensor, size: Size = None
    ) -> Tensor:
        """``soft_masks``, given the cells as a tensor."""
        logits = self.head.mask_pred[level].select(outputs.mask_features[level][image], channels)
        return resize(logits.sigmoid()[:, None], size or logits.shape[-2:])[:, 0]


class SOLOHead(CategoryHead):
    """Adds a mask tower on the feature maps, and an output conv per level."""

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

    def mask_feature(self, level: Tensor) -> Tensor:
        """(N, in_channels, h, w) -> (N, D, h, w), from which ``mask_pred`` makes (2h, 2w) masks.

        D is ``tower.conv_dim``.
        """
        return self.mask_tower(append_coordinates(level, self.axes))
