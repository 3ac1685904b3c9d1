"""Registering this package's backbones with Detectron2."""

from collections.abc import Callable
from functools import wraps
from typing import TypeVar

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import Tensor

from ..own_keys import warn_about_own_keys
from ..prepare import check_precision, checkpoint_activations, prepare

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


def _refuse_half(backbone: Backbone, args: tuple[Tensor, ...]) -> None:
    """For R-CNNs; an ``InstanceSegmentor`` looks for itself, whatever its backbone is."""
    weight = next(backbone.parameters())
    if args[0].dtype != weight.dtype and not torch.is_autocast_enabled(weight.device.type):
        check_precision(weight.dtype, weight.device)


def check_freeze_at(freeze_at: int) -> None:
    """
    Raises:
        ValueError: ``freeze_at`` is not in the range 0 (nothing), 1 (the stem) to 5 (everything).
    """
    if not 0 <= freeze_at <= 5:
        raise ValueError(f"freeze_at must be 0 to 5, not {freeze_at!r}")
