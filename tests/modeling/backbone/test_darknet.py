"""DarkNet-53, and the deformable blocks of YOLACT++."""

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_backbone
from torch import nn

from solo_d2 import add_solo_d2_config
from solo_d2.checkpoint.checkpointer import Checkpointer
from solo_d2.modeling.backbone.darknet import DarkNet


def build(name: str, *options) -> nn.Module:
    cfg = get_cfg()
    add_solo_d2_config(cfg)
    cfg.MODEL.BACKBONE.NAME = name
    # narrow, as only its structure matters here
    cfg.MODEL.RESNETS.WIDTH_PER_GROUP = 4
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 16
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res3", "res4", "res5"]
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.merge_from_list(list(options))
    return build_backbone(cfg)


def darknet(out_features=("res3", "res4", "res5"), **options) -> DarkNet:
    return DarkNet(out_features=[*out_features], **{"stem_channels": 4} | options)


class TestDarkNet:
    @torch.no_grad()
    def test_outputs_have_the_declared_shapes_for_any_size(self):
        names = [f"res{k}" for k in range(1, 6)]
        backbone = darknet(names).eval()
        outputs = backbone(torch.randn(2, 3, 70, 101))
        assert list(outputs) == names
        for name, shape in backbone.output_shape().items():
            size = (2, shape.channels, -(-70 // shape.stride), -(-101 // shape.stride))
            assert tuple(outputs[name].shape) == size

    @torch.no_grad()
    def test_has_the_published_widths_depths_and_sizes(self):
        with torch.device("meta"):
            backbone = build("build_darknet_backbone")
            outputs = backbone(torch.empty(1, 3, 550, 550))
        assert {name: tuple(x.shape[1:]) for name, x in outputs.items()} == {
            "res3": (256, 69, 69),
            "res4": (512, 35, 35),
            "res5": (1024, 18, 18),
        }
        stages = [getattr(backbone, f"res{k}") for k in range(1, 6)]
        assert [len(stage) - 1 for stage in stages] == [1, 2, 8, 8, 4]
        convs = sum(isinstance(module, nn.Conv2d) for module in backbone.modules())
        assert convs == 52  # 53 with the classifier

    @torch.no_grad()
    def test_a_block_adds_its_input_and_leaves_the_sum_alone(self):
        block = darknet(["res1"]).res1[1].eval()
        nn.init.constant_(block.conv2.norm.weight, 0)
        nn.init.constant_(block.conv2.norm.bias, -1)
        x = torch.randn(1, 8, 4, 4)
        torch.testing.assert_close(block(x), x - 0.1)  # leaky: -1 becomes -0.1; negatives stay

    def test_stages_that_nobody_asked_for_are_not_built(self):
        backbone = darknet(["res2"])
        assert not hasattr(backbone, "res3")

    @pytest.mark.parametrize("freeze_at", [0, 1, 3])
    def test_freezes_from_the_input_on(self, freeze_at):
        names = ["stem", *(f"res{k}" for k in range(1, 6))]
        backbone = darknet(names[1:], freeze_at=freeze_at)
        for k, name in enumerate(names):
            part = getattr(backbone, name)
            frozen = 0 < freeze_at and k <= freeze_at
            # a frozen batch norm has no parameters, so the convolutions' remain
            assert {p.requires_grad for p in part.parameters()} == {not frozen}
            norms = [m for m in part.modules() if isinstance(m, nn.BatchNorm2d)]
            assert bool(norms) != frozen

    def test_norm_is_configurable(self):
        modules = list(darknet(norm="FrozenBN").modules())
        assert any(isinstance(m, FrozenBatchNorm2d) for m in modules)
        assert not any(isinstance(m, nn.BatchNorm2d) for m in modules)

    @pytest.mark.parametrize(
        "option, value", [("out_features", ["res6"]), ("out_features", []), ("freeze_at", 6)]
    )
    def test_unsupported_values_are_named(self, option, value):
        with pytest.raises(ValueError, match=f"{option}.* must be "):
            darknet(**{option: value})

    def test_takes_a_backbone_under_yolacts_names(self, tmp_path):
        torch.manual_seed(0)
        backbone = darknet()
        weights = {}
        for name, value in backbone.state_dict().items():
            parts = name.split(".")
            stage = ["_preconv"] if parts[0] == "stem" else ["layers", str(int(parts[0][3]) - 1)]
            leaf = ["1", parts[-1]] if "norm" in parts else ["0", parts[-1]]
            inner = [part for part in parts[1:-1] if part != "norm"]
            weights[".".join([*stage, *inner, *leaf])] = torch.randn_like(value.float())
        assert "layers.2.0.0.weight" in weights and "layers.2.1.conv2.1.running_var" in weights
        torch.save(weights, tmp_path / "darknet53.pth")
        Checkpointer(backbone).load(str(tmp_path / "darknet53.pth"))
        state = backbone.state_dict()
        torch.testing.assert_close(state["stem.weight"], weights["_preconv.0.weight"])
        torch.testing.assert_close(
            state["res3.1.conv2.norm.running_var"], weights["layers.2.1.conv2.1.running_var"]
        )


class TestDeformableBlocks:
    def deform(self, *options) -> nn.Module:
        stages = ("MODEL.RESNETS.DEFORM_ON_PER_STAGE", [False, True, True, True])
        return build(
            "build_deform_resnet_backbone",
            *stages,
            "MODEL.RESNETS.DEFORM_MODULATED",
            True,
            *options,
        )

    def blocks(self, backbone: nn.Module) -> list[str]:
        return [n[: -len(".conv2_offset")] for n, _ in backbone.named_modules() if "offset" in n]

    @pytest.mark.parametrize(
        "depth, interval, res3, res4, res5",
        [
            (50, 1, range(4), range(6), range(3)),
            (101, 3, (0, 3), range(0, 23, 3), (0,)),
        ],
    )
    def test_interval_chooses_the_published_blocks(self, depth, interval, res3, res4, res5):
        options = ("MODEL.RESNETS.DEPTH", depth, "MODEL.RESNETS.DEFORM_INTERVAL", interval)
        with torch.device("meta"):
            found = self.blocks(self.deform(*options))
        stages = {"res3": res3, "res4": res4, "res5": res5}
        assert found == [f"{name}.{i}" for name, indices in stages.items() for i in indices]

    def test_bias_is_zero_at_first_and_there_on_request_only(self):
        conv = self.deform("MODEL.RESNETS.DEFORM_BIAS", True).res4[1].conv2
        assert conv.bias.tolist() == [0.0] * conv.out_channels
        assert self.deform().res4[1].conv2.bias is None

    @torch.no_grad()
    def test_bias_is_added_before_the_norm(self):
        backbone = self.deform("MODEL.RESNETS.DEFORM_BIAS", True, "MODEL.RESNETS.NORM", "BN").eval()
        conv = backbone.res3[1].conv2
        nn.init.constant_(conv.norm.running_mean, 0.5)
        x, offset = torch.randn(1, conv.in_channels, 6, 6), torch.zeros(1, 27, 6, 6)
        without = conv.sample(x, offset)
        nn.init.constant_(conv.bias, 0.5)
        scale = (conv.norm.running_var + conv.norm.eps).rsqrt()
        expected = without + 0.5 * scale.view(-1, 1, 1)
        torch.testing.assert_close(conv.sample(x, offset), expected)

    def test_interval_must_be_positive(self):
        with pytest.raises(ValueError, match="MODEL.RESNETS.DEFORM_INTERVAL"):
            self.deform("MODEL.RESNETS.DEFORM_INTERVAL", 0)
