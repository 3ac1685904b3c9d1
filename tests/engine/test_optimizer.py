import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from torch import nn

from solo_d2 import add_solo_d2_config
from solo_d2.engine import build_optimizer


def config(*overrides) -> CfgNode:
    cfg = get_cfg()
    add_solo_d2_config(cfg)
    cfg.merge_from_list(
        ["SOLVER.BASE_LR", 1.0, "SOLVER.WEIGHT_DECAY", 0.0, "SOLVER.MOMENTUM", 0.0, *overrides]
    )
    return cfg


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1, bias=False))


def set_gradients(net: nn.Module, scale: float) -> torch.Tensor:
    """The gradients of all parameters, flattened."""
    torch.manual_seed(1)
    for parameter in net.parameters():
        parameter.grad = torch.randn_like(parameter) * scale
    return torch.cat([p.grad.flatten() for p in net.parameters()])


def weights(net: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten().clone() for p in net.parameters()])


@pytest.mark.parametrize(("name", "kind"), [("SGD", torch.optim.SGD), ("AdamW", torch.optim.AdamW)])
def test_optimizers_have_detectron2s_parameter_groups(name, kind):
    cfg = config(
        *("SOLVER.OPTIMIZER", name, "SOLVER.WEIGHT_DECAY", 0.1, "SOLVER.WEIGHT_DECAY_NORM", 0.2),
        *("SOLVER.BIAS_LR_FACTOR", 2.0, "SOLVER.WEIGHT_DECAY_BIAS", 0.0),
    )
    net = model()
    optimizer = build_optimizer(cfg, net)
    assert isinstance(optimizer, kind)
    found = {p: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    assert found[net[0].weight] == (1.0, 0.1)
    assert found[net[0].bias] == (2.0, 0.0)
    assert found[net[1].weight] == (1.0, 0.2)


def test_the_backbone_has_its_own_learning_rate():
    net = nn.ModuleDict({"backbone": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
    optimizer = build_optimizer(config("SOLVER.BACKBONE_MULTIPLIER", 0.1), net)
    found = {p: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert found[net["backbone"].weight] == pytest.approx(0.1 * found[net["head"].weight])
    with pytest.raises(ValueError, match="SOLVER.BACKBONE_MULTIPLIER must be at least 0"):
        build_optimizer(config("SOLVER.BACKBONE_MULTIPLIER", -1.0), net)


@pytest.mark.parametrize(("scale", "is_clipped"), [(10.0, True), (0.01, False)])
def test_all_gradients_together_are_scaled_down_to_the_limit(scale, is_clipped):
    net = model()
    optimizer = build_optimizer(config("SOLVER.CLIP_TOTAL_GRAD_NORM", 2.0), net)
    before, gradient = weights(net), set_gradients(net, scale)
    assert (gradient.norm() > 2) == is_clipped
    optimizer.step()
    expected = gradient * (2 / gradient.norm() if is_clipped else 1)
    torch.testing.assert_close(before - weights(net), expected, rtol=1e-4, atol=1e-6)


def test_gradients_are_clipped_after_mixed_precision_unscaled_them():
    net = model()
    optimizer = build_optimizer(config("SOLVER.CLIP_TOTAL_GRAD_NORM", 2.0), net)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.zeros(()))  # as AMPTrainer does with the loss
    before, gradient = weights(net), set_gradients(net, 0.01 * 1024)
    scaler.step(optimizer)
    torch.testing.assert_close(before - weights(net), gradient / 1024, rtol=1e-4, atol=1e-6)
    # an overflow skips the step and raises nothing
    before = weights(net)
    scaler.update()
    set_gradients(net, float("inf"))
    scaler.step(optimizer)
    assert torch.equal(weights(net), before)


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_no_clipped_step_is_made_with_gradients_that_are_not_finite(name):
    net = model()
    cfg = config("SOLVER.CLIP_TOTAL_GRAD_NORM", 2.0, "SOLVER.OPTIMIZER", name)
    optimizer = build_optimizer(cfg, net)
    before = weights(net)
    set_gradients(net, float("nan"))
    with pytest.raises(RuntimeError, match="non-finite"):
        optimizer.step()
    assert torch.equal(weights(net), before)


def test_detectron2s_own_clipping_works_with_both_optimizers():
    for name in ("SGD", "AdamW"):
        net = model()
        options = ("SOLVER.CLIP_GRADIENTS.ENABLED", True, "SOLVER.CLIP_GRADIENTS.CLIP_VALUE", 0.5)
        optimizer = build_optimizer(config(*options, "SOLVER.OPTIMIZER", name), net)
        set_gradients(net, 10.0)
        optimizer.step()
        assert max(p.grad.abs().max() for p in net.parameters()) == 0.5
