"""SOLOv2: Dynamic and Fast Instance Segmentation (arXiv 2003.10152)."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import META_ARCH_REGISTRY
from torch import Tensor, nn
from torch.nn import functional as F

from solo_d2.layers.coord import append_coordinates
from solo_d2.layers.deform_conv import DeformConv2d
from solo_d2.layers.resample import resize, upsample2x
from solo_d2.layers.upload import upload

from ..options import check_at_least, check_channels
from .base import Levels, Size, SOLOFamily
from .head import (
    CategoryHead,
    HeadSpec,
    conv_norm_relu,
    output_conv,
    shared_channels,
)


class SOLOv2Outputs(NamedTuple):
    """Raw outputs for N images; lists have one entry per level, tuples one per image.

    The inputs of the masks are split by image once. If they were indexed at each use, the backward
    pass would fill a batch of zeros each time.
    """

    category_logits: list[Tensor]  # (N, C, S, S)
    kernels: list[tuple[Tensor, ...]]  # (D, S, S), D = E * kernel_size ** 2
    mask_features: tuple[Tensor, ...]  # (E, H, W) at the mask branch's stride, not negative


@META_ARCH_REGISTRY.register()
class SOLOv2(SOLOFamily):
    """A cell's mask is a dynamic convolution: its predicted kernel over the mask feature."""

    has_mask_branch = True

    @classmethod
    def from_config(cls, cfg) -> dict[str, Any]:
        options = super().from_config(cfg)
        solov2 = cfg.MODEL.SOLOV2
        shapes = options["backbone"].output_shape()
        head = SOLOv2Head(
            HeadSpec.from_config(cfg, shapes, options["assigner"].num_classes),
            mask_dim=solov2.MASK_DIM,
            kernel_size=solov2.KERNEL_SIZE,
        )
        mask_branch = MaskFeatureBranch(
            shapes,
            in_features=solov2.MASK_IN_FEATURES,
            conv_dim=solov2.MASK_CONV_DIM,
            out_dim=solov2.MASK_DIM,
            deformable=solov2.MASK_DEFORM,
            modulated=cfg.MODEL.SOLO.DEFORM_MODULATED,
        )
        return {**options, "head": head, "mask_branch": mask_branch}

    @property
    def mask_strides(self) -> list[int]:
        return [self.mask_branch.stride] * len(self.strides)

    def predict_masks(
        self, category_logits: list[Tensor], levels: Levels, features: dict[str, Tensor]
    ) -> SOLOv2Outputs:
        kernels = [
            () if x is None else self.head.kernels(x, grid).unbind()
            for x, grid in zip(levels, self.num_grids)
        ]
        return SOLOv2Outputs(category_logits, kernels, self.mask_branch(features).unbind())

    def soft_masks(
        self, outputs: SOLOv2Outputs, image: int, level: int, cells: np.ndarray, size: Size = None
    ) -> Tensor:
        kernels = outputs.kernels[level][image].flatten(1)
        kernels = kernels[:, upload(torch.from_numpy(cells), self.device)].T
        return self.kernel_masks(outputs.mask_features[image], kernels, size)

    def kernel_masks(self, feature: Tensor, kernels: Tensor, size: Size = None) -> Tensor:
        """Soft masks (n, H, W) of kernels (n, D) over an image's mask feature (E, h, w)."""
        logits = dynamic_conv(feature, kernels, self.head.kernel_size).float()
        return resize(logits.sigmoid()[None], size or logits.shape[-2:])[0]


class SOLOv2Head(CategoryHead):
    """Adds a kernel tower on the S x S grids (figure 2 of the paper)."""

    def __init__(self, spec: HeadSpec, *, mask_dim: int = 256, kernel_size: int = 1):
        """
        Args:
            spec: see ``HeadSpec``.
            mask_dim: E, channels of the mask feature.
            kernel_size: side of the dynamic kernels, odd.

        Raises:
            ValueError: an argument has an unsupported value.
        """
        super().__init__(spec)
        check_at_least(1, mask_dim=mask_dim)
        if kernel_size % 2 != 1:
            raise ValueError(f"kernel_size must be odd, not {kernel_size!r}")
        self.kernel_size = kernel_size
        self.axes = "xy" if spec.coord_conv else ""
        self.kernel_tower = spec.tower.build(spec.in_channels + len(self.axes))
        self.kernel_pred = output_conv(spec.tower.conv_dim, mask_dim * kernel_size**2)

    def kernels(self, level: Tensor, grid: int) -> Tensor:
        """(N, in_channels, h, w) -> (N, D, S, S)."""
        # As published, coordinates at the level's size are resized with the feature, so on the
        # grid they stay inside (-1, 1). Resizing them separately saves a copy of the feature.
        parts = [level]
        if self.axes:
            parts.append(append_coordinates(level[:, :0], self.axes))
        cells = torch.cat([resize(part, (grid, grid)) for part in parts], dim=1)
        return self.kernel_pred(self.kernel_tower(cells))


class MaskFeatureBranch(nn.Module):
    """The unified mask feature at the finest stride (SOLOv2, section 3.2, figure 3)."""

    def __init__(
        self,
        input_shape: dict[str, ShapeSpec],
        *,
        in_features: Sequence[str] = ("p2", "p3", "p4", "p5"),
        conv_dim: int = 128,
        out_dim: int = 256,
        norm: str = "GN",
        deformable: bool = False,
        modulated: bool = False,
    ):
        """
        Args:
            input_shape: shapes of the backbone's features.
            in_features: names of the inputs, finest first; each stride is twice the previous one.
            conv_dim: inner channels.
            out_dim: E, channels of the mask feature.
            norm: after each conv.
            deformable, modulated: use DCN (v2) for all convs, the final 1x1 included.

        Raises:
            ValueError: a feature is missing, or the strides or channels do not fit together.
        """
        super().__init__()
        check_channels(norm, conv_dim=conv_dim, out_dim=out_dim)
        channels = shared_channels(input_shape, in_features)
        strides = [input_shape[name].stride for name in in_features]
        if strides != [strides[0] * 2**i for i in range(len(strides))]:
            raise ValueError(
                f"in_features of the mask branch need strides that double, but {in_features} have "
                f"{strides}"
            )
        self.in_features = list(in_features)
        self.stride = strides[0]
        options = {"norm": norm, "deformable": deformable, "modulated": modulated}
        self.levels = nn.ModuleList()
        for i in range(len(in_features)):
            with_coordinates = 2 if i == len(in_features) - 1 else 0
            widths = [channels + with_coordinates] + [conv_dim] * max(i, 1)
            convs = [conv_norm_relu(a, b, **options) for a, b in zip(widths, widths[1:])]
            self.levels.append(nn.ModuleList(convs))
        self.output = conv_norm_relu(conv_dim, out_dim, kernel_size=1, **options)
        for conv in self.modules():
            if isinstance(conv, DeformConv2d):  # as published; in the towers, offsets start at zero
                nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
                nn.init.normal_(conv.offset.weight, std=0.01)

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        """
        Args:
            features: the backbone's features.

        Returns:
            (N, E, H, W) at the finest stride, not negative.
        """
        finest = self._run(0, features)
        coarser = [self._run(i, features) for i in range(1, len(self.levels))]
        if not coarser:
            return self.output(finest)
        # Upsampling is linear, so all coarser levels share the last step. The sums are not in place
        # because ReLU needs its output for the backward pass.
        return self.output(finest + upsample2x(sum(coarser[1:], coarser[0])))

    def _run(self, index: int, features: dict[str, Tensor]) -> Tensor:
        """One level, without its last upsampling."""
        x = features[self.in_features[index]]
        if index == len(self.levels) - 1:
            x = append_coordinates(x)  # the paper: only at the deepest level
        for i, conv in enumerate(self.levels[index]):
            x = conv(upsample2x(x) if i > 0 else x)
        return x


def dynamic_conv(feature: Tensor, kernels: Tensor, kernel_size: int = 1) -> Tensor:
    """Convolve one feature map with predicted kernels (SOLOv2, section 3.1), without bias.

    Args:
        feature: (E, H, W).
        kernels: (n, E * kernel_size ** 2), n may be 0.
        kernel_size: odd.

    Returns:
        (n, H, W) logits.
    """
    _, h, w = feature.shape
    if kernel_size > 1:
        feature = F.unfold(feature[None], kernel_size, padding=kernel_size // 2)[0]
    return (kernels @ feature.flatten(1)).view(-1, h, w)
