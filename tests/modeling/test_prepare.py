"""Folding and the memory format: for ours and for Detectron2's models alike."""

import copy

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import Conv2d, FrozenBatchNorm2d, get_norm
from detectron2.modeling import build_backbone
from torch import nn

from solo_d2 import add_solo_d2_config
from solo_d2.layers.frozen_bn import FoldedConv2d
from solo_d2.modeling.prepare import prepare


def layer(norm: str = "FrozenBN", bias: bool = False) -> Conv2d:
    torch.manual_seed(0)
    conv = Conv2d(8, 6, 3, padding=1, bias=bias, norm=get_norm(norm, 6), activation=nn.ReLU())
    for name in ("weight", "bias", "running_mean", "running_var"):
        nn.init.uniform_(getattr(conv.norm, name), 0.5, 1.5)
    return conv


@pytest.mark.parametrize("bias", [False, True])
def test_values_and_gradients_stay(bias):
    plain = layer(bias=bias)
    folded = prepare(copy.deepcopy(plain))
    assert type(folded) is FoldedConv2d
    x = torch.randn(2, 8, 5, 7)
    torch.testing.assert_close(folded(x), plain(x))
    for conv in (plain, folded):
        conv(x).square().sum().backward()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(
            folded.get_parameter(name).grad, parameter.grad, rtol=1e-4, atol=1e-4
        )


def test_activations_are_channels_last_whatever_the_image_is():
    model = prepare(nn.Sequential(layer(), nn.MaxPool2d(2), nn.Conv2d(6, 4, 1)))
    y = model(torch.randn(1, 8, 6, 6))
    assert y.is_contiguous(memory_format=torch.channels_last) and not y.is_contiguous()


def test_a_second_call_and_the_state_dict():
    model = nn.Sequential(layer(), layer("BN"), nn.Conv2d(6, 4, 1))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    once = prepare(model)
    types = [type(module) for module in once.modules()]
    assert prepare(once) is model and [type(module) for module in model.modules()] == types
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_trained_batch_norm_is_left_alone():
    assert type(prepare(layer("BN"))) is Conv2d


def test_a_frozen_batch_norm_may_be_copied_loaded_and_run_under_autocast():
    folded = copy.deepcopy(prepare(layer()))
    folded.load_state_dict(layer().state_dict())
    x = torch.randn(1, 8, 5, 5)
    with torch.autocast("cpu", torch.bfloat16):
        y = folded(x)
    torch.testing.assert_close(y.float(), layer()(x), rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    "name", ["build_fcos_resnet_fpn_backbone", "build_deform_resnet_fpn_backbone"]
)
def test_a_backbone_of_this_package_is_prepared_in_any_model(name):
    cfg = get_cfg()
    add_solo_d2_config(cfg)
    cfg.MODEL.BACKBONE.NAME = name
    cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 18, 64
    cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
    modules = list(build_backbone(cfg).modules())
    assert any(isinstance(module, FoldedConv2d) for module in modules)
    for module in modules:
        if isinstance(getattr(module, "norm", None), FrozenBatchNorm2d):
            assert type(module) is FoldedConv2d
