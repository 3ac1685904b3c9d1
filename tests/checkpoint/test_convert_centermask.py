"""Checkpoints of CenterMask2 and VoVNet convert, or load, with nothing unused or missing."""

import re

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_backbone, build_model
from torch import nn

from solo_d2 import add_solo_d2_config
from solo_d2.checkpoint import Checkpointer
from solo_d2.checkpoint.architecture import config_with_classes, packaged_shapes
from solo_d2.checkpoint.convert import convert_checkpoint, find_configs
from solo_d2.checkpoint.load import adapt_to_model
from solo_d2.checkpoint.rename_rules import convert, join, recognize
from solo_d2.checkpoint.sources import SOURCES
from solo_d2.config import load_config
from solo_d2.errors import UserError
from solo_d2.tools.convert import main

SMALLEST = "centermask_v19_slim_dw_lite"
CONFIG = "CenterMask/CenterMask_Lite_V19_slim_dw_4x.yaml"
STAGES = ["stage2", "stage3", "stage4", "stage5"]
BACKBONES = ["19_slim_dw", "19_dw", "19_slim", "19", "39", "57", "99"]


@pytest.fixture(scope="module")
def published(stand_in_weights):
    """The smallest detector, with values."""
    return stand_in_weights(SMALLEST)


def shapes(weights) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in weights.items()}


class TestDetectors:
    @pytest.mark.golden
    def test_the_command_converts_and_the_result_loads(self, published, tmp_path, capsys):
        torch.save({"model": published, "iteration": 359999}, tmp_path / "centermask.pth")
        target = tmp_path / "converted.pth"
        assert main([str(tmp_path / "centermask.pth"), str(target)]) == 0
        printed = capsys.readouterr().out
        assert "centermask2" in printed and CONFIG in printed
        arguments = ["--config-file", CONFIG]
        assert main([str(tmp_path / "centermask.pth"), str(target), *arguments]) == 0
        cfg = find_configs(published, recognize(published))[0].config()
        cfg.MODEL.DEVICE = "cpu"
        model = build_model(cfg)
        Checkpointer(model).load(str(target))
        scales = [published[f"proposal_generator.fcos_head.scales.{i}.scale"] for i in range(5)]
        assert torch.equal(model.proposal_generator.head.scales, torch.cat(scales))
        key = "backbone.bottom_up.stage5.OSA5_1.layers.2.OSA5_1_2/pw_conv1x1.weight"
        layer = model.backbone.bottom_up.stage5.osa1.layers[2]
        assert torch.equal(layer.pointwise.weight, published[key])

    @pytest.mark.golden
    def test_a_published_file_loads_as_it_is(self, published, tmp_path, caplog):
        torch.save({"model": published}, tmp_path / "centermask.pth")
        cfg = config_with_classes(load_config(CONFIG), 80)
        cfg.MODEL.DEVICE = "cpu"
        model = build_model(cfg)
        with caplog.at_level("WARNING"):
            Checkpointer(model).load(str(tmp_path / "centermask.pth"))
        assert not caplog.records
        converted = convert(published)
        assert all(torch.equal(v, converted[k]) for k, v in model.state_dict().items())

    @pytest.mark.golden
    def test_a_lost_scale_is_named(self, key_table):
        lost = "proposal_generator.fcos_head.scales.2.scale"
        weights = {k: v for k, v in key_table(SMALLEST).items() if k != lost}
        with pytest.raises(UserError, match=r"head\.scales is \(4,\), the model has \(5,\)"):
            find_configs(weights, recognize(weights))

    @pytest.mark.golden
    def test_pixel_statistics_of_old_files_are_dropped(self, key_table):
        weights = {**key_table(SMALLEST), "pixel_mean": torch.zeros(3, 1, 1)}
        assert "pixel_mean" not in convert(weights)

    def test_mobilenetv2_converts(self, tmp_path):
        """Its backbone has torchvision's names from before 0.3, which are made from ours here."""
        cfg = load_config("CenterMask/CenterMask_Lite_MobileNetV2_4x.yaml")
        cfg = config_with_classes(cfg, 80)
        cfg.MODEL.DEVICE = "cpu"
        model = build_model(cfg)
        for buffer in model.backbone.buffers():
            if buffer.is_floating_point():
                buffer.uniform_(0.5, 1.5)  # statistics that matter
        published = {old_mobilenetv2_name(k): v for k, v in model.state_dict().items()}
        scales = published.pop("proposal_generator.head.scales")
        published = {official_head_name(k): v for k, v in published.items()}
        published |= {
            f"proposal_generator.fcos_head.scales.{i}.scale": scales[i : i + 1] for i in range(5)
        }
        assert "backbone.bottom_up.features.17.conv.7.running_var" in published
        assert "backbone.bottom_up.features.1.conv.4.weight" in published
        source = recognize(published)
        assert source.name == "centermask2"
        names = [match.name for match in find_configs(published, source)]
        assert "CenterMask/CenterMask_Lite_MobileNetV2_4x.yaml" in names
        converted = convert_checkpoint(published, source, cfg)
        torch.save(converted, tmp_path / "converted.pth")
        other = build_model(cfg)
        Checkpointer(other, require_complete=True).load(str(tmp_path / "converted.pth"))
        image = torch.rand(1, 3, 64, 96)
        with torch.no_grad():
            levels, again = model.eval().backbone(image), other.eval().backbone(image)
        assert list(levels) == ["p3", "p4", "p5", "p6", "p7"]
        assert all(torch.equal(levels[name], again[name]) for name in levels)

    def test_panoptic_models_convert(self):
        """Their names are made from ours here; the semantic branch is Detectron2's."""
        name = "CenterMask/PanopticCenterMask_R50_3x.yaml"
        weights = numbered(packaged_shapes(name, 80))
        scales = weights.pop("proposal_generator.head.scales")
        published = {official_head_name(k): v for k, v in weights.items()}
        published |= {
            f"proposal_generator.fcos_head.scales.{i}.scale": scales[i : i + 1] for i in range(5)
        }
        source = recognize(published)
        assert (source.name, source.architecture) == ("centermask2_panoptic", "PanopticFPN")
        (match,) = find_configs(published, source)
        assert (match.name, match.num_classes, match.differences) == (name, 80, 0)
        converted = convert_checkpoint(published, source, match.config())
        key = "sem_seg_head.p5.4.norm.weight"
        assert torch.equal(converted[key], published[key])

    @pytest.mark.golden
    def test_a_panoptic_vovnet_has_the_names_of_the_instance_model_and_a_few_more(self, key_table):
        name = "CenterMask/PanopticCenterMask_V39_3x.yaml"
        more = re.compile(r"sem_seg_head\.|backbone\.fpn_(lateral|output)2\.")
        semantic = {k: v for k, v in numbered(packaged_shapes(name, 80)).items() if more.match(k)}
        published = {**key_table("centermask_v39"), **semantic}
        (match,) = find_configs(published, recognize(published))
        assert (match.name, match.differences) == (name, 0)

    def test_detectron2s_own_panoptic_models_are_not_taken_for_them(self):
        names = ["sem_seg_head.predictor.weight", "proposal_generator.rpn_head.conv.weight"]
        assert recognize(names) is None


def numbered(sizes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Tensors with different numbers, without memory for values."""
    return {k: torch.tensor(float(i)).expand(x) for i, (k, x) in enumerate(sizes.items())}


def old_mobilenetv2_name(name: str) -> str:
    """A block was one flat list of layers; the first block has no expansion."""
    match = re.fullmatch(r"(.*features\.(\d+)\.conv)\.(\d)(?:\.(\d))?\.(\w+)", name)
    if not match:
        return name
    place, block, layer, inner, leaf = match.groups()
    pairs = 1 if block == "1" else 2  # of convolution, norm and ReLU6, before the last two layers
    index = 3 * int(layer) + int(inner) if inner else 3 * pairs + int(layer) - pairs
    return f"{place}.{index}.{leaf}"


def official_head_name(name: str) -> str:
    name = name.replace("proposal_generator.head.", "proposal_generator.fcos_head.")
    for ours, theirs in (("class_tower", "cls_tower"), ("box_tower", "bbox_tower")):
        name = re.sub(
            rf"{ours}\.(\d)\.(norm\.)?",
            lambda m, to=theirs: f"{to}.{3 * int(m[1]) + bool(m[2])}.",
            name,
        )
    for ours, theirs in {
        "class_logits": "cls_logits",
        "box_pred": "bbox_pred",
        "centerness": "ctrness",
        "mask_head.attention": "mask_head.spatialAtt",
        "mask_iou_head.conv": "maskiou_head.maskiou_fcn",
        "mask_iou_head.fc": "maskiou_head.maskiou_fc",
        "mask_iou_head.predictor": "maskiou_head.maskiou",
    }.items():
        name = name.replace(ours, theirs)
    return name


def test_pieces_are_joined_in_the_order_of_their_numbers():
    prefix = "proposal_generator.fcos_head.scales"
    weights = {f"{prefix}.{i}.scale": torch.tensor([float(i)]) for i in (10, 2, 0, 1)}
    joined = join({**weights, "other": torch.zeros(1)}, SOURCES["centermask2"])
    assert list(joined) == ["other", prefix]
    assert joined[prefix].tolist() == [0, 1, 2, 10]


def body(depth: str, name: str = "build_vovnet_backbone", **options) -> nn.Module:
    cfg = get_cfg()
    add_solo_d2_config(cfg)
    cfg.MODEL.BACKBONE.NAME = name
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.VOVNET.CONV_BODY = f"V-{depth.replace('_', '-')}-eSE"
    cfg.MODEL.FPN.IN_FEATURES = cfg.MODEL.VOVNET.OUT_FEATURES
    for key, value in options.items():
        cfg.MODEL.VOVNET[key] = value
    return build_backbone(cfg)


class TestImageNetWeights:
    @pytest.mark.golden
    @pytest.mark.parametrize("depth", BACKBONES)
    def test_every_tensor_finds_its_place(self, key_table, depth):
        weights = key_table(f"vovnet{depth}_imagenet")
        source = recognize(weights)
        assert source.name == "vovnet"
        with torch.device("meta"):
            expected = shapes(body(depth).state_dict())
        assert shapes(convert(weights)) == expected
        # and inside a pyramid
        with torch.device("meta"):
            keys = body(depth, "build_vovnet_fpn_backbone").state_dict()
        adapted = adapt_to_model(weights, keys)
        assert set(adapted) == {key for key in keys if key.startswith("bottom_up.")}

    @pytest.mark.golden
    @pytest.mark.parametrize("norm", ["FrozenBN", "BN"])
    @pytest.mark.parametrize("prefix", ["", "backbone.bottom_up."])
    def test_counters_and_a_classifier_are_tolerated(
        self, stand_in_weights, tmp_path, caplog, norm, prefix
    ):
        weights = {
            prefix + name.removeprefix("backbone.bottom_up."): value
            for name, value in stand_in_weights("vovnet19_slim_dw_imagenet").items()
        }
        counters = {
            name.replace("running_var", "num_batches_tracked"): torch.tensor(7)
            for name in weights
            if name.endswith("running_var")
        }
        classifier = {f"{prefix}classifier.{k}": torch.zeros(1000) for k in ("weight", "bias")}
        torch.save({**weights, **counters, **classifier}, tmp_path / "vovnet.pth")
        backbone = body("19_slim_dw", NORM=norm)
        with caplog.at_level("WARNING"):
            Checkpointer(backbone).load(str(tmp_path / "vovnet.pth"))
        assert not caplog.records
        state = backbone.state_dict()
        for name, value in convert(weights).items():
            assert torch.equal(state[name], value), name

    @pytest.mark.golden
    @pytest.mark.parametrize(
        "config", ["SOLOv2/SOLOv2_R50_1x", "MaskRCNN/MaskRCNN_V39_3x", "CenterMask/FCOS_R50_3x"]
    )
    def test_a_detector_of_any_architecture_starts_from_it(self, key_table, config):
        pyramid = "build_fcos_vovnet" if "FCOS" in config else "build_vovnet"
        cfg = load_config(
            f"{config}.yaml",
            opts=[
                *("MODEL.BACKBONE.NAME", f"{pyramid}_fpn_backbone"),
                *("MODEL.VOVNET.CONV_BODY", "V-19-eSE"),
                *("MODEL.VOVNET.OUT_FEATURES", STAGES),
                *("MODEL.FPN.IN_FEATURES", STAGES),
            ],
        )
        cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ()
        for part in ("SOLO", "FCOS", "ROI_HEADS"):
            cfg.MODEL[part].NUM_CLASSES = 3
        cfg.MODEL.DEVICE = "meta"
        with torch.device("meta"):
            expected = shapes(build_model(cfg).state_dict())
        adapted = shapes(adapt_to_model(key_table("vovnet19_imagenet"), expected))
        prefix = "backbone.bottom_up."
        assert adapted == {k: v for k, v in expected.items() if k.startswith(prefix)}

    @pytest.mark.golden
    def test_a_detector_that_only_names_its_backbone_so_loads_too(self, key_table):
        """Like vovnet-detectron2's Mask R-CNN: the other names are Detectron2's and ours."""
        cfg = load_config("MaskRCNN/MaskRCNN_V19_FPNLite_3x.yaml")
        cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ()
        cfg.MODEL.ROI_HEADS.NUM_CLASSES = 80
        cfg.MODEL.DEVICE = "meta"
        with torch.device("meta"):
            expected = build_model(cfg).state_dict()
        prefix = "backbone.bottom_up."
        heads = {k: v for k, v in expected.items() if not k.startswith(prefix)}
        adapted = adapt_to_model({**heads, **key_table("vovnet19_imagenet")}, expected)
        assert shapes(adapted) == shapes(expected)
