"""Registering this package's backbones with Detectron2, and what they have in common."""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import TypeVar

import torch
from detectron2.config import CfgNode
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import Tensor, nn

from ..own_keys import warn_about_own_keys
from ..prepare import check_precision, checkpoint_activations, prepare
from .fpn import build_fcos_fpn, build_fpn

BackboneT = TypeVar("BackboneT", bound=Backbone)
Builder = Callable[[CfgNode, ShapeSpec], BackboneT]


def register_backbone(build: Builder[BackboneT]) -> Builder[BackboneT]:
    """Register a builder and make it return prepared backbones, see ``prepare``.

    It also warns about keys that the pipeline may not honor: in a Mask R-CNN, the backbone is the
    only part from this package that sees the config.
    """

    @wraps(build)
    def build_prepared(cfg: CfgNode, input_shape: ShapeSpec) -> BackboneT:
        warn_about_own_keys(cfg)
        backbone = prepare(build(cfg, input_shape))
        if cfg.MODEL.BACKBONE.CHECKPOINT_ACTIVATIONS:
            checkpoint_activations(backbone)
        backbone.register_forward_pre_hook(_refuse_half)
        return backbone

    BACKBONE_REGISTRY.register(build_prepared)
    return build_prepared


def register_pyramids(build: Builder[BackboneT], *, fpn: str, fcos_fpn: str) -> None:
    """Register two more builders, which put a pyramid on the backbone that ``build`` returns.

    Args:
        build: builder of the bottom-up backbone.
        fpn: name of the builder with the pyramid P2 to P6, see ``build_fpn``.
        fcos_fpn: name of the builder with FCOS's pyramid, P3 to P7, see ``build_fcos_fpn``.
    """
    for name, build_pyramid in ((fpn, build_fpn), (fcos_fpn, build_fcos_fpn)):

        def build_both(cfg, input_shape, build_pyramid=build_pyramid):
            return build_pyramid(cfg, build(cfg, input_shape))

        build_both.__name__ = name
        register_backbone(build_both)


def _refuse_half(backbone: Backbone, args: tuple[Tensor, ...]) -> None:
    """For R-CNNs; an ``InstanceSegmentor`` looks for itself, whatever its backbone is."""
    weight = next(backbone.parameters())
    if args[0].dtype != weight.dtype and not torch.is_autocast_enabled(weight.device.type):
        check_precision(weight.dtype, weight.device)


def check_stages(out_features: Sequence[str], names: Sequence[str], freeze_at: int) -> None:
    """
    Raises:
        ValueError: ``out_features`` are not some of ``names``; see also ``check_freeze_at``.
    """
    if not out_features or not set(out_features) <= set(names):
        raise ValueError(f"out_features must be some of {[*names]}, not {[*out_features]}")
    check_freeze_at(freeze_at)


def check_freeze_at(freeze_at: int) -> None:
    """
    Raises:
        ValueError: ``freeze_at`` is not in the range 0 (nothing), 1 (the stem) to 5 (everything).
    """
    if not 0 <= freeze_at <= 5:
        raise ValueError(f"freeze_at must be 0 to 5, not {freeze_at!r}")


def freeze(module: nn.Module) -> None:
    """Freeze the parameters and the batch norms of a module, in place."""
    module.requires_grad_(False)
    FrozenBatchNorm2d.convert_frozen_batchnorm(module)
