"""VoVNetV2, and FCOS's pyramid over the backbones."""

import copy

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from detectron2.modeling import build_backbone, build_model
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import nn

from solo_d2 import add_solo_d2_config
from solo_d2.layers import masks as mask_ops
from solo_d2.layers.deform_conv import DeformConv2d
from solo_d2.layers.frozen_bn import FoldedConv2d
from solo_d2.modeling.backbone.vovnet import BODIES, EffectiveSqueezeExcitation, OSAModule

STAGES = ["stage2", "stage3", "stage4", "stage5"]
ALL = ["stem", *STAGES]


def config(name: str = "build_vovnet_backbone", *options):
    cfg = get_cfg()
    add_solo_d2_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.BACKBONE.NAME = name
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    # narrow, as only its structure matters here
    cfg.MODEL.VOVNET.WIDTH_MULT = 0.125
    cfg.MODEL.FPN.OUT_CHANNELS = 32
    cfg.MODEL.FPN.IN_FEATURES = STAGES
    cfg.merge_from_list(list(options))
    return cfg


def body(name: str = "V-39-eSE", *options) -> nn.Module:
    outputs = ("MODEL.VOVNET.OUT_FEATURES", ALL)
    return build_backbone(
        config("build_vovnet_backbone", "MODEL.VOVNET.CONV_BODY", name, *outputs, *options)
    )


@pytest.mark.parametrize("name", BODIES)
@torch.no_grad()
def test_outputs_have_the_declared_shapes(name):
    backbone = body(name).eval()
    outputs = backbone(torch.randn(2, 3, 64, 96))
    assert list(outputs) == ALL
    for output, shape in backbone.output_shape().items():
        size = (2, shape.channels, 64 // shape.stride, 96 // shape.stride)
        assert tuple(outputs[output].shape) == size
    assert [shape.stride for shape in backbone.output_shape().values()] == [4, 4, 8, 16, 32]


@pytest.mark.parametrize("side", [61, 62, 63, 64, 65, 70, 101])
@torch.no_grad()
def test_sizes_of_odd_images(side):
    """The stem rounds up; pooling takes ceil((n - 3) / 2) + 1 of n."""
    outputs = body("V-19-slim-dw-eSE").eval()(torch.randn(1, 3, side, 64))
    n = -(-side // 4)
    expected = [n, n]
    for _ in range(3):
        n = -(-(n - 3) // 2) + 1
        expected.append(n)
    assert [x.shape[2] for x in outputs.values()] == expected
    assert [x.shape[3] for x in outputs.values()] == [16, 16, 8, 4, 2]


def test_outputs_are_in_order_and_stages_beyond_the_last_are_not_built():
    backbone = body("V-19-eSE", "MODEL.VOVNET.OUT_FEATURES", ["stage3", "stem"])
    assert list(backbone(torch.randn(1, 3, 32, 32))) == ["stem", "stage3"]
    assert list(backbone.output_shape()) == ["stem", "stage3"]
    assert not hasattr(backbone, "stage4")


class TestStructure:
    @torch.no_grad()
    def test_the_gate_of_ese(self):
        ese = EffectiveSqueezeExcitation(2)
        nn.init.eye_(ese.fc.weight[:, :, 0, 0])
        ese.fc.bias.copy_(torch.tensor([0.0, 10.0]))
        x = torch.tensor([[1.5, -1.5], [0.0, 4.0]])  # two pixels, two channels
        x = x.T.reshape(1, 2, 1, 2)
        # means 0 + 0 -> 3 / 6, and 2 + 10 -> 1
        assert x.mean((2, 3)).tolist() == [[0.75, 1.25]]
        expected = [(0.75 + 3) / 6, 1.0]
        torch.testing.assert_close(ese.gate(x).flatten(), torch.tensor(expected))
        torch.testing.assert_close(ese(x), x * torch.tensor(expected).view(1, 2, 1, 1))

    @pytest.mark.parametrize("name", BODIES)
    def test_only_later_modules_of_a_stage_add_their_input(self, name):
        with torch.device("meta"):
            backbone = body(name)
        for stage, count in zip(STAGES, BODIES[name].modules):
            identities = [module.identity for module in getattr(backbone, stage)]
            assert identities == [False] + [True] * (count - 1)

    @torch.no_grad()
    def test_no_activation_follows_the_sum(self):
        module = body("V-57-eSE").stage4[1].eval()
        nn.init.constant_(module.ese.fc.weight, 0.0)
        nn.init.constant_(module.ese.fc.bias, -10.0)  # the gate is closed
        x = torch.randn(1, module.concat.out_channels, 3, 3)
        assert x.min() < 0
        torch.testing.assert_close(module(x), x)

    @pytest.mark.parametrize(
        "name, reduced",
        [
            ("V-19-slim-dw-eSE", [False, True, True, True]),
            ("V-19-dw-eSE", [True, True, True, True]),
            ("V-19-eSE", [False] * 4),
        ],
    )
    def test_depthwise_bodies_reduce_where_widths_differ(self, name, reduced):
        with torch.device("meta"):
            backbone = body(name, "MODEL.VOVNET.WIDTH_MULT", 1.0)
        assert [getattr(backbone, s)[0].reduction is not None for s in STAGES] == reduced

    def test_a_wider_body_is_asked_for_by_its_factor(self):
        wide = BODIES["V-19-eSE"].scaled(2.0)
        assert wide.stem == (128, 128, 256) and wide.out == (512, 1024, 1536, 2048)
        for named in BODIES.values():
            assert named.scaled(1.0) == named

    def test_initial_values_keep_the_scale_of_activations(self):
        torch.manual_seed(0)
        conv = body("V-39-eSE", "MODEL.VOVNET.WIDTH_MULT", 1.0).stage3[0].layers[1]
        expected = (2 / (conv.in_channels * 9)) ** 0.5
        assert conv.weight.std().item() == pytest.approx(expected, rel=0.02)


class TestNorms:
    @pytest.mark.parametrize(
        "norm, kind",
        [
            ("FrozenBN", FrozenBatchNorm2d),
            ("BN", nn.BatchNorm2d),
            ("SyncBN", nn.SyncBatchNorm),
            ("GN", nn.GroupNorm),
        ],
    )
    @pytest.mark.parametrize("name", ["V-19-eSE", "V-19-dw-eSE"])
    def test_every_convolution_but_the_depthwise_and_eses_has_it(self, name, norm, kind):
        with torch.device("meta"):
            backbone = body(name, "MODEL.VOVNET.NORM", norm, "MODEL.VOVNET.WIDTH_MULT", 1.0)
        for key, module in backbone.named_modules():
            if isinstance(module, nn.Conv2d):
                bare = key.endswith((".ese.fc", ".depthwise"))
                assert isinstance(module.norm, type(None) if bare else kind), key
                assert (module.bias is not None) == key.endswith(".ese.fc"), key

    def test_frozen_batch_norms_are_folded_without_a_change(self):
        torch.manual_seed(0)
        backbone = body("V-19-slim-dw-eSE")
        for module in backbone.modules():
            if isinstance(module, FrozenBatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias)
                nn.init.normal_(module.running_mean)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
        plain = copy.deepcopy(backbone)
        for module in plain.modules():
            if isinstance(module, FoldedConv2d):
                module.__class__ = Conv2d
        norms = sum(isinstance(m, FrozenBatchNorm2d) for m in backbone.modules())
        assert sum(isinstance(m, FoldedConv2d) for m in backbone.modules()) == norms > 0
        x = torch.randn(1, 3, 64, 64)
        expected = plain(x)
        for name, feature in backbone(x).items():
            torch.testing.assert_close(feature, expected[name], rtol=1e-4, atol=1e-4)
        sum(f.sum() for f in backbone(x).values()).backward()
        assert all(p.grad is not None for p in backbone.parameters())

    def test_group_norm_names_widths_that_it_cannot_divide(self):
        with pytest.raises(ValueError, match="norm 'GN'.* 80 channels"):
            body("V-19-slim-eSE", "MODEL.VOVNET.NORM", "GN", "MODEL.VOVNET.WIDTH_MULT", 1.0)


@pytest.mark.parametrize("freeze_at", range(6))
@pytest.mark.parametrize("norm", ["BN", "GN"])
def test_freezes_from_the_input_on_and_only_those_norms(norm, freeze_at):
    options = ("MODEL.BACKBONE.FREEZE_AT", freeze_at, "MODEL.VOVNET.NORM", norm)
    with torch.device("meta"):
        backbone = body("V-19-eSE", *options, "MODEL.VOVNET.WIDTH_MULT", 1.0)
    for index, name in enumerate(ALL, start=1):
        part = getattr(backbone, name)
        frozen = index <= freeze_at
        assert {p.requires_grad for p in part.parameters()} == {not frozen}, name
        learning = [m for m in part.modules() if isinstance(m, nn.BatchNorm2d)]
        assert bool(learning) == (norm == "BN" and not frozen), name


class TestDeformable:
    OPTIONS = ("MODEL.VOVNET.STAGE_WITH_DCN", (False, True, True, True))
    MODULATED = ("MODEL.VOVNET.WITH_MODULATED_DCN", True)

    @pytest.mark.parametrize("modulated, outputs", [(False, 18), (True, 27)])
    def test_every_3x3_of_these_stages_has_offsets(self, modulated, outputs):
        options = (*self.OPTIONS, "MODEL.VOVNET.WITH_MODULATED_DCN", modulated)
        backbone = body("V-39-eSE", *options)
        convs = [n for n, m in backbone.named_modules() if isinstance(m, DeformConv2d)]
        modules = [(f"stage{k}", b) for k, n in ((3, 1), (4, 2), (5, 2)) for b in range(1, n + 1)]
        assert convs == [f"{s}.osa{b}.layers.{i}" for s, b in modules for i in range(5)]
        for name in convs:
            conv = backbone.get_submodule(name)
            assert conv.bias is None and conv.norm is not None
            assert conv.offset.out_channels == outputs
            assert not conv.offset.weight.any() and not conv.offset.bias.any()

    @torch.no_grad()
    def test_starts_as_the_plain_one(self):
        plain = body("V-19-eSE").eval()
        backbone = body("V-19-eSE", *self.OPTIONS).eval()
        missing, unexpected = backbone.load_state_dict(plain.state_dict(), strict=False)
        assert not unexpected and all(".offset." in name for name in missing)
        x = torch.randn(1, 3, 64, 64)
        expected = plain(x)
        for name, feature in backbone(x).items():
            torch.testing.assert_close(feature, expected[name], rtol=1e-3, atol=1e-3)

    def test_gradient_reaches_the_offsets(self):
        torch.manual_seed(0)
        backbone = body("V-19-eSE", *self.OPTIONS, *self.MODULATED, "MODEL.VOVNET.NORM", "BN")
        sum(f.square().mean() for f in backbone(torch.randn(2, 3, 64, 64)).values()).backward()
        for name, parameter in backbone.named_parameters():
            if ".offset." in name:
                assert parameter.grad.abs().sum() > 0, name

    def test_depthwise_wins(self):
        modules = body("V-19-dw-eSE", *self.OPTIONS).modules()
        assert not any(isinstance(module, DeformConv2d) for module in modules)


@pytest.mark.parametrize(
    "key, value, name",
    [
        ("VOVNET.CONV_BODY", "V-27-slim-eSE", "MODEL.VOVNET.CONV_BODY"),
        ("VOVNET.OUT_FEATURES", ["stage6"], "out_features"),
        ("VOVNET.OUT_FEATURES", [], "out_features"),
        ("VOVNET.NORM", "IN", "norm"),
        ("VOVNET.STAGE_WITH_DCN", (True,), "deform_on_per_stage"),
        ("BACKBONE.FREEZE_AT", -1, "freeze_at"),
    ],
)
def test_unsupported_values_are_named(key, value, name):
    with pytest.raises(ValueError, match=f"{name}.* must "):
        build_backbone(config("build_vovnet_backbone", f"MODEL.{key}", value))


class TestPyramids:
    def features(self, backbone: nn.Module, height: int = 64, width: int = 96):
        backbone.eval()
        with torch.no_grad():
            features = backbone(torch.randn(1, 3, height, width))
        for name, shape in backbone.output_shape().items():
            size = (1, shape.channels, -(-height // shape.stride), -(-width // shape.stride))
            assert tuple(features[name].shape) == size
        return features

    def test_plain(self):
        backbone = build_backbone(config("build_vovnet_fpn_backbone"))
        assert list(self.features(backbone)) == ["p2", "p3", "p4", "p5", "p6"]
        assert backbone.size_divisibility == 32

    @pytest.mark.parametrize(
        "name, key, features",
        [
            ("vovnet", "VOVNET", STAGES[1:]),
            ("resnet", "RESNETS", ["res3", "res4", "res5"]),
            ("mobilenetv2", "MOBILENETV2", ["res3", "res4", "res5"]),
        ],
    )
    @pytest.mark.parametrize("top_levels", [0, 1, 2, 3])
    def test_fcos(self, name, key, features, top_levels):
        options = [f"MODEL.{key}.OUT_FEATURES", features, "MODEL.FPN.IN_FEATURES", features]
        options += ["MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64]
        levels = [f"p{k}" for k in range(3, 6 + top_levels)]
        options += ["MODEL.FCOS.IN_FEATURES", levels]
        backbone = build_backbone(config(f"build_fcos_{name}_fpn_backbone", *options))
        assert list(self.features(backbone)) == levels
        assert backbone.size_divisibility == 32
        names = {f"p{k}.{t}" for k in range(6, 6 + top_levels) for t in ("weight", "bias")}
        top_block = backbone.top_block
        assert {n for n, _ in top_block.named_parameters()} == names if top_block else not names

    @torch.no_grad()
    def test_p6_is_made_of_p5_and_p7_of_its_positive_part(self):
        backbone = build_backbone(config("build_fcos_vovnet_fpn_backbone")).eval()
        features = self.features(backbone)
        p6, p7 = backbone.top_block.p6, backbone.top_block.p7
        torch.testing.assert_close(features["p6"], p6(features["p5"]))
        torch.testing.assert_close(features["p7"], p7(features["p6"].relu()))
        assert features["p6"].min() < 0

    def test_a_finer_pyramid_for_small_images(self):
        options = ("MODEL.FPN.IN_FEATURES", STAGES[:3], "MODEL.FCOS.IN_FEATURES", ["p2", "p5"])
        backbone = build_backbone(config("build_fcos_vovnet_fpn_backbone", *options))
        assert list(self.features(backbone)) == ["p2", "p3", "p4", "p5"]
        assert hasattr(backbone.top_block, "p5")

    def test_a_deformable_resnet_can_stand_under_it(self):
        options = ["MODEL.RESNETS.OUT_FEATURES", ["res3", "res4", "res5"]]
        options += ["MODEL.FPN.IN_FEATURES", ["res3", "res4", "res5"]]
        options += ["MODEL.RESNETS.WIDTH_PER_GROUP", 8, "MODEL.RESNETS.RES2_OUT_CHANNELS", 32]
        options += ["MODEL.RESNETS.DEFORM_ON_PER_STAGE", [False, False, False, True]]
        backbone = build_backbone(config("build_fcos_resnet_fpn_backbone", *options))
        self.features(backbone)
        assert any(isinstance(module, DeformConv2d) for module in backbone.modules())

    @pytest.mark.parametrize(
        "name", ["build_vovnet_fpn_backbone", "build_fcos_vovnet_fpn_backbone"]
    )
    def test_features_that_the_body_does_not_have_are_named(self, name):
        with pytest.raises(ValueError, match=r"MODEL\.FPN\.IN_FEATURES has 'res2'.*stage2"):
            build_backbone(config(name, "MODEL.FPN.IN_FEATURES", ["res2", "res3"]))

    @pytest.mark.parametrize("mask_on", [False, True])
    def test_levels_that_only_masks_need_are_built(self, mask_on):
        options = ["MODEL.FCOS.IN_FEATURES", ["p3"], "MODEL.ROI_HEADS.IN_FEATURES", ["p5", "p6"]]
        options += ["MODEL.FPN.IN_FEATURES", STAGES[1:], "MODEL.MASK_ON", mask_on]
        backbone = build_backbone(config("build_fcos_vovnet_fpn_backbone", *options))
        assert list(self.features(backbone)) == ["p3", "p4", "p5", "p6"][: 3 + mask_on]


def example(height: int = 64, width: int = 96) -> dict:
    masks = torch.zeros(2, height, width, dtype=torch.bool)
    masks[0, 8:40, 8:40] = True
    masks[1, 20:60, 50:90] = True
    instances = Instances(
        (height, width),
        gt_masks=BitMasks(masks),
        gt_boxes=Boxes(torch.tensor([[8.0, 8, 40, 40], [50, 20, 90, 60]])),
        gt_classes=torch.tensor([0, 2]),
    )
    image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
    return {"image": image, "height": height, "width": width, "instances": instances}


@pytest.mark.parametrize(
    "options",
    [
        ("MODEL.META_ARCHITECTURE", "SOLOv2"),
        ("MODEL.META_ARCHITECTURE", "SOLOv2", "MODEL.VOVNET.CONV_BODY", "V-19-slim-dw-eSE"),
        # Detectron2's own
        (
            *("MODEL.META_ARCHITECTURE", "GeneralizedRCNN"),
            *("MODEL.RPN.IN_FEATURES", ["p2", "p3", "p4", "p5", "p6"]),
            *("MODEL.ANCHOR_GENERATOR.SIZES", [[16], [32], [64], [128], [256]]),
            *("MODEL.ROI_HEADS.NAME", "StandardROIHeads"),
            *("MODEL.ROI_HEADS.IN_FEATURES", ["p2", "p3", "p4", "p5"]),
            *("MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvFCHead"),
            *("MODEL.ROI_BOX_HEAD.NUM_FC", 1, "MODEL.ROI_BOX_HEAD.FC_DIM", 32),
            *("MODEL.ROI_MASK_HEAD.CONV_DIM", 32),
        ),
    ],
    ids=["SOLOv2", "SOLOv2 depthwise", "Mask R-CNN"],
)
def test_detectors_train_and_predict_with_it(options):
    torch.manual_seed(0)
    small = ["MODEL.SOLO.NUM_CLASSES", 3, "MODEL.ROI_HEADS.NUM_CLASSES", 3, "MODEL.MASK_ON", True]
    small += ["MODEL.SOLO.CONV_DIM", 32, "MODEL.SOLO.NUM_CONVS", 1]
    small += ["MODEL.SOLOV2.MASK_DIM", 32, "MODEL.SOLOV2.MASK_CONV_DIM", 32]
    small += ["MODEL.VOVNET.CONV_BODY", "V-19-eSE", "MODEL.VOVNET.NORM", "BN"]
    cfg = config("build_vovnet_fpn_backbone", *small, *options)
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ()
    model = build_model(cfg)
    with EventStorage():
        losses = model([example(), example(61, 70) | {"height": 122}])
    sum(losses.values()).backward()
    bottom_up = model.backbone.bottom_up
    assert sum(isinstance(module, OSAModule) for module in bottom_up.modules()) == 4
    for name, parameter in bottom_up.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    with torch.no_grad():
        instances = model.eval()([example()])[0]["instances"]
    assert instances.image_size == (64, 96)
    assert instances.has("pred_masks")


@torch.no_grad()
def test_strips_of_rows_do_not_change_the_aggregation(monkeypatch, largest_float):
    module = body("V-39-eSE").stage2[0].eval()
    x = torch.randn(2, module.layers[0].in_channels, 12, 16)
    with torch.enable_grad():
        whole = module(x)
    monkeypatch.setattr(mask_ops, "CHUNK_BYTES", 4 * 5 * 2 * module.concat.in_channels * 16 * 4)
    with largest_float() as seen:
        strips = module(x)
    torch.testing.assert_close(strips, whole)
    assert seen.bytes < 2 * module.concat.in_channels * 12 * 16 * 4 / 2
