"""Our backbones: shapes, freezing, and weights made for the originals."""

from collections import OrderedDict

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_backbone
from torch import nn
from torchvision.models import mobilenet_v2

from solo_d2 import add_solo_d2_config
from solo_d2.checkpoint.checkpointer import Checkpointer
from solo_d2.config import load_config

PLAIN = "build_resnet_fpn_backbone"
DEFORM = "build_deform_resnet_fpn_backbone"
MOBILE = "build_mobilenetv2_fpn_backbone"


def build(name: str, *options) -> nn.Module:
    cfg = get_cfg()
    add_solo_d2_config(cfg)
    cfg.MODEL.BACKBONE.NAME = name
    # narrow, as only its structure matters here
    cfg.MODEL.RESNETS.WIDTH_PER_GROUP = 8
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 32
    cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.FPN.OUT_CHANNELS = 16
    cfg.merge_from_list(list(options))
    return build_backbone(cfg)


def deform(*stages: bool) -> tuple:
    return ("MODEL.RESNETS.DEFORM_ON_PER_STAGE", list(stages))


def trained(module: nn.Module) -> set[bool]:
    return {p.requires_grad for p in module.parameters()}


@pytest.mark.parametrize("name", [DEFORM, MOBILE])
@torch.no_grad()
def test_pyramid_has_five_levels(name):
    backbone = build(name, *deform(False, True, True, True)).eval()
    features = backbone(torch.randn(1, 3, 64, 96))
    sizes = {name: tuple(feature.shape) for name, feature in features.items()}
    assert sizes == {f"p{k}": (1, 16, -(-64 // 2**k), -(-96 // 2**k)) for k in range(2, 7)}
    shapes = backbone.output_shape()
    assert {name: (s.channels, s.stride) for name, s in shapes.items()} == {
        f"p{k}": (16, 2**k) for k in range(2, 7)
    }
    assert backbone.size_divisibility == 32


@pytest.mark.parametrize("fpn", ["", "fcos_"])
@pytest.mark.parametrize(
    ("features", "message"),
    [
        ([], "strides that double"),
        (["res5", "res4"], "strides that double|stride 32, .* not with 'res4'"),
        (["res3", "res5"], "strides that double"),
        (["res4", "res9"], "has 'res9'"),
    ],
)
def test_features_of_a_pyramid_are_refused_by_key(fpn, features, message):
    cfg = load_config()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.BACKBONE.NAME = f"build_{fpn}mobilenetv2_fpn_backbone"
    cfg.MODEL.FPN.IN_FEATURES = features
    with pytest.raises(ValueError, match=rf"MODEL\.FPN\.IN_FEATURES .*({message})"):
        build_backbone(cfg)


def test_a_pyramid_of_p5_and_p6_needs_a_feature_of_stride_32():
    cfg = load_config()
    cfg.MODEL.BACKBONE.NAME = "build_mobilenetv2_fpn_backbone"
    cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4"]
    with pytest.raises(ValueError, match="stride 32, which P5 and P6 are made from, not .*'res4'"):
        build_backbone(cfg)


class TestDeformResNet:
    @pytest.mark.parametrize("options", [(), ("MODEL.RESNETS.NUM_GROUPS", 2)])
    @torch.no_grad()
    def test_starts_as_the_plain_one(self, options):
        plain = build(PLAIN, *options).eval()
        backbone = build(DEFORM, *deform(False, True, True, True), *options).eval()
        missing, unexpected = backbone.load_state_dict(plain.state_dict(), strict=False)
        assert not unexpected and all(".conv2_offset." in name for name in missing)
        x = torch.randn(1, 3, 64, 64)
        expected = plain(x)
        for name, feature in backbone(x).items():
            torch.testing.assert_close(feature, expected[name], rtol=1e-3, atol=1e-3)

    @pytest.mark.parametrize("modulated, outputs", [(False, 18), (True, 27)])
    def test_offsets_have_detectron2_names(self, modulated, outputs):
        backbone = build(
            DEFORM, *deform(False, False, True, False), "MODEL.RESNETS.DEFORM_MODULATED", modulated
        )
        offsets = {n: p.shape for n, p in backbone.named_parameters() if "offset" in n}
        assert set(offsets) == {
            f"bottom_up.res4.{block}.conv2_offset.{kind}"
            for block in range(6)
            for kind in ("weight", "bias")
        }
        assert {shape[0] for shape in offsets.values()} == {outputs}

    def test_gradient_reaches_the_offsets(self):
        backbone = build(DEFORM, *deform(False, False, False, True))
        sum(f.square().sum() for f in backbone(torch.randn(1, 3, 64, 64)).values()).backward()
        for name, parameter in backbone.named_parameters():
            if "offset" in name:
                assert parameter.grad.abs().sum() > 0, name

    def test_frozen_stages_stay_frozen_when_deformable(self):
        backbone = build(DEFORM, *deform(False, True, True, False), "MODEL.BACKBONE.FREEZE_AT", 3)
        bottom_up = backbone.bottom_up
        for stage in (bottom_up.stem, bottom_up.res2, bottom_up.res3):
            assert trained(stage) == {False}
        for stage in (bottom_up.res4, bottom_up.res5):
            assert trained(stage) == {True}
        assert isinstance(bottom_up.res3[0].conv2.norm, FrozenBatchNorm2d)

    def test_basic_blocks_are_refused_by_key(self):
        options = ("MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64)
        with pytest.raises(ValueError, match="MODEL.RESNETS.DEFORM_ON_PER_STAGE.*18"):
            build(DEFORM, *deform(False, False, False, True), *options)

    def test_without_deformable_stages_it_is_the_plain_one(self):
        assert list(build(DEFORM).state_dict()) == list(build(PLAIN).state_dict())


class TestMobileNetV2:
    @torch.no_grad()
    def test_outputs_have_the_declared_shapes(self):
        bottom_up = build(MOBILE).bottom_up.eval()
        outputs = bottom_up(torch.randn(2, 3, 64, 96))
        for name, shape in bottom_up.output_shape().items():
            size = (2, shape.channels, 64 // shape.stride, 96 // shape.stride)
            assert tuple(outputs[name].shape) == size
        channels = [shape.channels for shape in bottom_up.output_shape().values()]
        assert channels == [24, 32, 96, 320]

    @torch.no_grad()
    def test_width_is_configurable(self):
        bottom_up = build(MOBILE, "MODEL.MOBILENETV2.WIDTH_MULT", 0.5).bottom_up.eval()
        outputs = bottom_up(torch.randn(1, 3, 32, 32))
        for name, shape in bottom_up.output_shape().items():
            assert outputs[name].shape[1] == shape.channels

    @pytest.mark.parametrize("freeze_at, blocks", [(0, 0), (1, 1), (2, 4), (3, 7), (5, 18)])
    def test_freezes_from_the_input_on(self, freeze_at, blocks):
        options = ("MODEL.BACKBONE.FREEZE_AT", freeze_at, "MODEL.MOBILENETV2.NORM", "BN")
        features = build(MOBILE, *options).bottom_up.features
        assert [trained(block) == {False} for block in features] == [
            i < blocks for i in range(len(features))
        ]
        for i, block in enumerate(features):
            has_batch_norm = any(isinstance(m, nn.BatchNorm2d) for m in block.modules())
            assert has_batch_norm == (i >= blocks)

    def test_frozen_batch_norm_is_the_default(self):
        modules = list(build(MOBILE).bottom_up.modules())
        assert any(isinstance(m, FrozenBatchNorm2d) for m in modules)
        assert not any(isinstance(m, nn.BatchNorm2d) for m in modules)

    @pytest.mark.parametrize(
        "key, value, message",
        [
            ("MOBILENETV2.NORM", "GN", "norm must be .* not 'GN'"),
            ("MOBILENETV2.OUT_FEATURES", ["res6"], "out_features must be .*'res5'.* not .'res6'"),
            ("BACKBONE.FREEZE_AT", 6, "freeze_at must be 0 to 5, not 6"),
        ],
    )
    def test_unsupported_values_are_named(self, key, value, message):
        with pytest.raises(ValueError, match=message):
            build(MOBILE, f"MODEL.{key}", value)

    @torch.no_grad()
    def check_features(self, bottom_up: nn.Module, original: nn.Module):
        x = torch.randn(1, 3, 64, 64)
        outputs = bottom_up.eval()(x)
        torch.testing.assert_close(
            outputs["res5"], original.eval().features[:18](x), rtol=1e-3, atol=1e-3
        )

    @pytest.mark.parametrize("norm", ["FrozenBN", "BN"])
    def test_takes_torchvisions_own_file(self, tmp_path, norm):
        torch.manual_seed(0)
        original = mobilenet_v2(weights=None)
        for module in original.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.running_var, 0.5, 1.5)
                nn.init.normal_(module.running_mean, std=0.1)
        torch.save(original.state_dict(), tmp_path / "mobilenet_v2.pth")
        backbone = build(MOBILE, "MODEL.MOBILENETV2.NORM", norm)
        Checkpointer(backbone).load(str(tmp_path / "mobilenet_v2.pth"))
        self.check_features(backbone.bottom_up, original)

    def test_detectron2s_checkpointer_refuses_what_it_would_not_load(self, tmp_path):
        """Torchvision's names have no prefix, so it would warn and train from random weights."""
        path = tmp_path / "mobilenet_v2.pth"
        torch.save(mobilenet_v2(weights=None).state_dict(), path)
        model = nn.Sequential(OrderedDict(backbone=build(MOBILE)))
        with pytest.raises(ValueError, match=r"backbone\.bottom_up\.features.*solo_d2.checkpoint"):
            DetectionCheckpointer(model).load(str(path))
        torch.save(model.state_dict(), path)
        DetectionCheckpointer(model).load(str(path))

    def test_takes_the_older_files_weights_whole(self, data_dir):
        path = data_dir / "weights" / "mobilenetv2_imagenet.pth"
        if not path.exists():
            pytest.skip(f"no {path}")
        backbone = build(MOBILE)
        Checkpointer(backbone).load(str(path))
        # the layers of a block were renamed since, their order is the same
        values = torch.load(path, weights_only=True).values()
        original = mobilenet_v2(weights=None)
        original.load_state_dict(dict(zip(original.state_dict(), values)), strict=False)
        self.check_features(backbone.bottom_up, original)
