"""Folding and the memory format, for our models and for Detectron2's."""

import copy

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import Conv2d, FrozenBatchNorm2d, get_norm
from detectron2.modeling import build_backbone, build_model
from detectron2.utils.events import EventStorage
from example_inputs import ORDINARY, example
from tiny_models import CENTERMASK, SOLO, YOLACT, tiny_model
from torch import nn

from solo_d2 import add_solo_d2_config
from solo_d2.layers import frozen_bn
from solo_d2.layers.frozen_bn import FoldedConv2d, FoldedSequential
from solo_d2.modeling.prepare import precision, prepare, prepare_for_inference


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


def test_norms_of_a_sequential_are_folded_too():
    def block() -> nn.Sequential:
        torch.manual_seed(0)
        model = nn.Sequential(
            *(nn.Conv2d(8, 6, 3, groups=2, bias=False), layer().norm, nn.ReLU6(inplace=True)),
            *(nn.Conv2d(6, 4, 1), nn.Conv2d(4, 6, 1), copy.deepcopy(layer().norm)),
        )
        return model

    plain, folded = block(), prepare(nn.Sequential(block(), nn.Identity()))
    assert type(folded) is nn.Sequential and type(folded[0]) is FoldedSequential
    x = torch.randn(2, 8, 5, 7)
    torch.testing.assert_close(folded(x), plain(x), rtol=1e-4, atol=1e-5)
    for model in (plain, folded):
        model(x).square().sum().backward()
    for name, parameter in plain.named_parameters():
        grad = folded[0].get_parameter(name).grad
        torch.testing.assert_close(grad, parameter.grad, rtol=1e-4, atol=1e-4)
    assert list(folded[0].state_dict()) == list(plain.state_dict())


def test_a_norm_without_a_convolution_before_it_stays():
    norm = layer().norm
    model = nn.Sequential(norm, nn.Conv2d(6, 6, 1), norm)
    x = torch.randn(1, 6, 3, 3)
    expected = norm(model[1](norm(x)))
    torch.testing.assert_close(prepare(model)(x), expected)


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


NORMS = ["FrozenBN", "BN"]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("in_sequence", [False, True])
@torch.no_grad()
def test_products_of_weights_are_kept_until_a_weight_changes(norm, in_sequence, monkeypatch):
    plain = layer(norm).eval()
    if in_sequence:
        plain = nn.Sequential(nn.Conv2d(8, 6, 3), plain.norm).eval()
    folded = prepare(copy.deepcopy(plain))
    folds = []
    fold = frozen_bn._fold
    monkeypatch.setattr(frozen_bn, "_fold", lambda *args: folds.append(args) or fold(*args))
    x = torch.randn(2, 8, 5, 7)

    def check(times: int):
        folds.clear()
        for _ in range(3):
            torch.testing.assert_close(folded(x), plain(x), rtol=1e-4, atol=1e-5)
        assert len(folds) == times

    check(1)
    check(0)
    for name, value in plain.state_dict().items():
        if value.is_floating_point():
            for model in (plain, folded):
                model.state_dict()[name].mul_(1.5)  # as an optimizer or a checkpoint does
            check(1)
    for model in (plain, folded):  # beyond what autograd sees
        next(model.parameters()).data.mul_(2.0)
        model.train().eval()
    check(1)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(folded(x), plain(x), rtol=0.1, atol=0.1)
    with torch.enable_grad():
        check(3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@torch.no_grad()
def test_inference_alone_holds_no_weight_twice_and_computes_the_same(dtype):
    plain = tiny_model({**SOLO, "MODEL.META_ARCHITECTURE": "SOLOv2"}).eval()
    folded = prepare_for_inference(copy.deepcopy(plain).train(), dtype)
    assert not any(isinstance(x, FrozenBatchNorm2d) for x in folded.modules())
    inputs = torch.rand(1, 3, 64, 96)
    with precision("cpu", dtype):
        outputs, expected = folded.dense(inputs), plain.dense(inputs)
    assert folded.backbone.bottom_up.res2[0].conv1.weight.dtype == getattr(torch, dtype)
    tolerance = {"float32": 1e-5, "bfloat16": 0.05}[dtype]
    for a, b in zip(outputs.category_logits, expected.category_logits):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_a_trained_batch_norm_sees_every_batch_and_is_folded_in_eval_mode_only():
    plain = layer("BN")
    folded = prepare(copy.deepcopy(plain))
    x = torch.randn(4, 8, 5, 7)
    for mode in (True, False, True, False):
        for _ in range(2):
            assert torch.allclose(folded.train(mode)(x), plain.train(mode)(x), atol=1e-5)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(folded.state_dict()[name], value, msg=name)
    for conv in (plain, folded):  # frozen statistics, trained factors
        conv(x).square().sum().backward()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(
            folded.get_parameter(name).grad, parameter.grad, rtol=1e-4, atol=1e-3
        )


@pytest.mark.parametrize(
    "settings",
    [
        {**SOLO, "MODEL.META_ARCHITECTURE": "SOLO"},
        YOLACT,
        {**CENTERMASK, "MODEL.BACKBONE.NAME": "build_fcos_vovnet_fpn_backbone"},
    ],
    ids=["Detectron2's backbone", "our backbone with BN", "an R-CNN on ours"],
)
def test_checkpointed_activations_change_no_gradient_and_no_statistic(settings, largest_float):
    options = {}
    if "vovnet" in settings["MODEL.BACKBONE.NAME"]:
        names = ["stage3", "stage4", "stage5"]
        options = {"MODEL__VOVNET__WIDTH_MULT": 0.125, "MODEL__VOVNET__OUT_FEATURES": names}
        options |= {"MODEL__FPN__IN_FEATURES": names, "MODEL__VOVNET__NORM": "BN"}
    plain = tiny_model(settings, **options)
    saving = tiny_model(settings, **options, MODEL__BACKBONE__CHECKPOINT_ACTIVATIONS=True)
    assert list(saving.state_dict()) == list(plain.state_dict())
    saved = []
    for model in (plain, copy.deepcopy(saving)):  # a copy must run on its own weights
        torch.manual_seed(0)
        sizes = 0

        def count(tensor):
            nonlocal sizes
            sizes += tensor.numel() if tensor.dim() == 4 else 0
            return tensor

        with EventStorage(), torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            sum(model.train()([example(ORDINARY)]).values()).backward()
        saved.append(sizes)
        gradients = {k: p.grad for k, p in model.named_parameters() if p.requires_grad}
        state = model.state_dict()
        if model is plain:
            expected = gradients, {k: v.clone() for k, v in state.items()}
    assert saved[1] < 0.8 * saved[0]
    for found, wanted in zip((gradients, state), expected):
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_a_frozen_batch_norm_may_be_copied_loaded_and_run_under_autocast():
    folded = copy.deepcopy(prepare(layer()))
    folded.load_state_dict(layer().state_dict())
    x = torch.randn(1, 8, 5, 5)
    with torch.autocast("cpu", torch.bfloat16):
        y = folded(x)
    torch.testing.assert_close(y.float(), layer()(x), rtol=0.05, atol=0.05)


def config(*options):
    cfg = get_cfg()
    add_solo_d2_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 18, 64
    cfg.MODEL.FPN.OUT_CHANNELS = 16
    cfg.merge_from_list(list(options))
    return cfg


@pytest.mark.parametrize(
    "name, key, prefix",
    [
        ("build_fcos_resnet_fpn_backbone", "RESNETS", "res"),
        ("build_deform_resnet_fpn_backbone", "RESNETS", "res"),
        ("build_mobilenetv2_fpn_backbone", "MOBILENETV2", "res"),
        ("build_vovnet_fpn_backbone", "VOVNET", "stage"),
    ],
)
def test_backbones_of_this_package_are_prepared_in_any_model(name, key, prefix):
    cfg = config("MODEL.BACKBONE.NAME", name, "MODEL.VOVNET.WIDTH_MULT", 0.125)
    names = [f"{prefix}{k}" for k in (3, 4, 5)]
    cfg.MODEL[key].OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = names
    backbone = build_backbone(cfg)
    norms = [module for module in backbone.modules() if isinstance(module, FrozenBatchNorm2d)]
    called = []
    for norm in norms:
        norm.register_forward_hook(lambda *args: called.append(args))
    features = backbone(torch.randn(1, 3, 64, 64))
    assert norms and not called
    assert features["p3"].is_contiguous(memory_format=torch.channels_last)


MASK_RCNN = (
    *("MODEL.META_ARCHITECTURE", "GeneralizedRCNN", "MODEL.MASK_ON", True),
    *("MODEL.RESNETS.OUT_FEATURES", ["res2", "res3", "res4", "res5"]),
    *("MODEL.FPN.IN_FEATURES", ["res2", "res3", "res4", "res5"]),
    *("MODEL.RPN.IN_FEATURES", ["p2", "p3", "p4", "p5", "p6"]),
    *("MODEL.ANCHOR_GENERATOR.SIZES", [[16], [32], [64], [128], [256]]),
    *("MODEL.ROI_HEADS.NAME", "StandardROIHeads", "MODEL.ROI_HEADS.NUM_CLASSES", 3),
    *("MODEL.ROI_HEADS.IN_FEATURES", ["p2", "p3", "p4", "p5"]),
    *("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0, "TEST.DETECTIONS_PER_IMAGE", 5),
    *("MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvFCHead"),
    *("MODEL.ROI_BOX_HEAD.NUM_FC", 1, "MODEL.ROI_BOX_HEAD.FC_DIM", 16),
    *("MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead", "MODEL.ROI_MASK_HEAD.CONV_DIM", 16),
)


@torch.no_grad()
def test_mask_rcnn_on_our_resnet_is_that_on_detectron2s():
    torch.manual_seed(0)
    theirs, ours = (
        build_model(config(*MASK_RCNN, "MODEL.BACKBONE.NAME", name)).eval()
        for name in ("build_resnet_fpn_backbone", "build_deform_resnet_fpn_backbone")
    )
    ours.load_state_dict(theirs.state_dict())
    inputs = [{"image": torch.rand(3, 64, 96) * 255}]
    expected, found = (model(inputs)[0]["instances"] for model in (theirs, ours))
    assert len(found) == len(expected) > 0
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        found.pred_boxes.tensor, expected.pred_boxes.tensor, rtol=1e-4, atol=1e-3
    )
    again = prepare(theirs)(inputs)[0]["instances"]
    torch.testing.assert_close(again.scores, expected.scores, rtol=1e-4, atol=1e-5)


def test_mask_rcnn_on_our_backbone_warns_about_keys_of_our_trainer(caplog):
    cfg = config(*MASK_RCNN, "MODEL.BACKBONE.NAME", "build_deform_resnet_fpn_backbone")
    cfg.SOLVER.CLIP_TOTAL_GRAD_NORM = 0.125  # warned about once per value
    build_model(cfg)
    assert "SOLVER.CLIP_TOTAL_GRAD_NORM 0.125" in caplog.text
