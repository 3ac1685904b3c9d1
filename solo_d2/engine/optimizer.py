"""The optimizer that SOLVER.OPTIMIZER and SOLVER.CLIP_TOTAL_GRAD_NORM ask for."""

from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping
from torch import nn


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """Detectron2's SGD, or AdamW with the same parameter groups.

    For any Detectron2 trainer: return it from the trainer's ``build_optimizer``. Gradients are
    clipped within ``step``, that is, after ``AMPTrainer`` has unscaled them.

    Raises:
        ValueError: SOLVER.OPTIMIZER, CLIP_TOTAL_GRAD_NORM or BACKBONE_MULTIPLIER has an unsupported
            value.
    """
    solver = cfg.SOLVER
    if solver.CLIP_TOTAL_GRAD_NORM < 0:
        raise ValueError(
            "SOLVER.CLIP_TOTAL_GRAD_NORM must be positive, or 0 for no limit, not "
            f"{solver.CLIP_TOTAL_GRAD_NORM!r}"
        )
    if solver.BACKBONE_MULTIPLIER < 0:
        raise ValueError(
            f"SOLVER.BACKBONE_MULTIPLIER must be at least 0, not {solver.BACKBONE_MULTIPLIER!r}"
        )
    kinds: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
        "SGD": (torch.optim.SGD, {"momentum": solver.MOMENTUM, "nesterov": solver.NESTEROV}),
        "AdamW": (torch.optim.AdamW, {}),
    }
    if solver.OPTIMIZER not in kinds:
        raise ValueError(f"SOLVER.OPTIMIZER must be 'SGD' or 'AdamW', not {solver.OPTIMIZER!r}")
    kind, options = kinds[solver.OPTIMIZER]

    def lr_factor(name: str) -> float:
        # Detectron2's ``bias_lr_factor`` would replace the backbone's factor, not multiply it
        factor = (solver.BIAS_LR_FACTOR or 1.0) if name.endswith(".bias") else 1.0
        return factor * (solver.BACKBONE_MULTIPLIER if "backbone." in name else 1.0)

    groups = get_default_optimizer_params(
        model,
        base_lr=solver.BASE_LR,
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
        lr_factor_func=lr_factor,
    )
    optimizer = maybe_add_gradient_clipping(cfg, kind)(
        groups, lr=solver.BASE_LR, weight_decay=solver.WEIGHT_DECAY, foreach=True, **options
    )
    if solver.CLIP_TOTAL_GRAD_NORM > 0:
        clip_total_grad_norm(optimizer, solver.CLIP_TOTAL_GRAD_NORM)
    return optimizer


def clip_total_grad_norm(optimizer: torch.optim.Optimizer, max_norm: float) -> None:
    """Make each ``step`` scale down the gradients to a total L2 norm of at most ``max_norm``.

    If the norm is not finite, ``step`` raises a RuntimeError instead of ruining the weights.
    """

    def clip(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        nn.utils.clip_grad_norm_(parameters, max_norm, error_if_nonfinite=True)

    optimizer.register_step_pre_hook(clip)
