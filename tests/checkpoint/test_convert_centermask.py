"""Checkpoints of CenterMask2 and VoVNet convert, or load, with nothing left over or missing."""

from pathlib import Path

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_backbone, build_model
from torch import nn

from solo_d2 import add_solo_d2_config
from solo_d2.checkpoint.architecture import infer_config
from solo_d2.checkpoint.checkpointer import Checkpointer
from solo_d2.checkpoint.convert import config_for, convert_checkpoint, main
from solo_d2.checkpoint.load import adapt_to_model
from solo_d2.checkpoint.rename_rules import convert, join, recognize
from solo_d2.checkpoint.sources import SOURCES
from solo_d2.config import load_config
from solo_d2.errors import UserError

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
# table -> config of the same model
DETECTORS = {
    "centermask_v39": "CenterMask_V39_3x",
    "centermask_lite_v39": "CenterMask_Lite_V39_4x",
    "centermask_r50": "CenterMask_R50_3x",
    "centermask_v19_slim_dw_lite": "CenterMask_Lite_V19_slim_dw_4x",
}
SMALLEST = "centermask_v19_slim_dw_lite"
STAGES = ["stage2", "stage3", "stage4", "stage5"]
BACKBONES = ["19_slim_dw", "19_dw", "19_slim", "19", "39", "57", "99"]


@pytest.fixture(scope="module")
def tables(reference_dir):
    """Table -> its tensors on the meta device."""

    def read(table: str) -> dict[str, torch.Tensor]:
        rows = [
            line.split("\t")
            for line in (reference_dir / "keys" / f"{table}.keys.tsv").read_text().splitlines()
            if line and not line.startswith(("#", "name\t"))
        ]
        return {
            name: torch.empty(
                () if shape == "-" else [int(n) for n in shape.split("x")], device="meta"
            )
            for name, shape, *_ in rows
        }

    return read


@pytest.fixture(scope="module")
def published(stand_in_weights):
    """The smallest detector, with values."""
    return stand_in_weights(SMALLEST)


def shapes(weights) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in weights.items()}


class TestDetectors:
    @pytest.mark.golden
    @pytest.mark.parametrize("table", DETECTORS)
    def test_every_tensor_finds_its_place(self, tables, table):
        weights = tables(table)
        source = recognize(weights)
        assert source.name == "centermask2"
        cfg = config_for(weights, source)
        assert cfg.MODEL.FCOS.NUM_CLASSES == cfg.MODEL.ROI_HEADS.NUM_CLASSES
        converted = convert_checkpoint(weights, source, cfg)
        pieces = [name for name in weights if ".scales." in name]
        assert len(converted) == len(weights) - len(pieces) + 1
        assert converted["proposal_generator.head.scales"].shape == (len(pieces),)
        numbers = sum(value.numel() for value in weights.values())
        assert sum(value.numel() for value in converted.values()) == numbers

    @pytest.mark.golden
    @pytest.mark.parametrize("table", DETECTORS)
    def test_the_config_has_a_place_for_it(self, tables, table):
        weights = tables(table)
        cfg = load_config(str(CONFIGS / f"CenterMask/{DETECTORS[table]}.yaml"))
        cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ()
        inferred = config_for(weights, recognize(weights)).MODEL
        cfg.MODEL.FCOS.NUM_CLASSES = inferred.FCOS.NUM_CLASSES
        convert_checkpoint(weights, recognize(weights), cfg)
        # what the shapes tell is what the config says, weights and names of data aside
        body = "RESNETS" if "r50" in table else "VOVNET"
        for part in ("BACKBONE", body, "FPN", "FCOS", "CENTERMASK", "ROI_MASK_HEAD"):
            assert cfg.MODEL[part] == inferred[part], part
        assert cfg.MODEL.ROI_HEADS.IN_FEATURES == inferred.ROI_HEADS.IN_FEATURES

    @pytest.mark.golden
    def test_the_command_converts_and_the_result_loads(self, published, tmp_path, capsys):
        torch.save({"model": published, "iteration": 359999}, tmp_path / "centermask.pth")
        target = tmp_path / "converted.pth"
        assert main([str(tmp_path / "centermask.pth"), str(target)]) == 0
        printed = capsys.readouterr().out
        assert "centermask2" in printed and "MODEL.VOVNET.CONV_BODY V-19-slim-dw-eSE" in printed
        arguments = ["--config-file", str(CONFIGS / f"CenterMask/{DETECTORS[SMALLEST]}.yaml")]
        assert main([str(tmp_path / "centermask.pth"), str(target), *arguments]) == 0
        cfg = config_for(published, recognize(published))
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
        cfg = config_for(published, recognize(published))
        cfg.MODEL.DEVICE = "cpu"
        model = build_model(cfg)
        with caplog.at_level("WARNING"):
            Checkpointer(model).load(str(tmp_path / "centermask.pth"))
        assert not caplog.records
        converted = convert(published)
        assert all(torch.equal(v, converted[k]) for k, v in model.state_dict().items())

    @pytest.mark.golden
    @pytest.mark.parametrize(
        "remove",
        [
            "proposal_generator.fcos_head.scales.2.scale",
            "proposal_generator.fcos_head.cls_tower.3.weight",
            "roi_heads.mask_head.mask_fcn1.bias",
            "roi_heads.mask_head.spatialAtt.conv.weight",
            "roi_heads.maskiou_head.maskiou.weight",
            "backbone.bottom_up.stage3.OSA3_1.conv_reduction.OSA3_1_reduction_0/norm.bias",
            "backbone.top_block.p7.bias",
        ],
    )
    def test_a_missing_tensor_is_named(self, tables, remove):
        weights = {k: v for k, v in tables(SMALLEST).items() if k != remove}
        source = recognize(weights)
        with pytest.raises(UserError, match="missing: |scales is .4,., the model has .5,"):
            convert_checkpoint(weights, source, config_for(weights, source))

    @pytest.mark.golden
    def test_an_unknown_tensor_is_named(self, tables):
        weights = {**tables(SMALLEST), "roi_heads.keypoint_head.score.weight": torch.zeros(1)}
        with pytest.raises(UserError, match=r"unused.*roi_heads\.keypoint_head\.score\.weight"):
            config_for(weights, recognize(weights))

    @pytest.mark.golden
    def test_pixel_statistics_of_old_files_are_dropped(self, tables):
        weights = {**tables(SMALLEST), "pixel_mean": torch.zeros(3, 1, 1)}
        assert "pixel_mean" not in convert(weights)

    @pytest.mark.parametrize(
        "name",
        sorted(
            path.stem
            for path in (CONFIGS / "CenterMask").glob("CenterMask_*.yaml")
            if "MobileNetV2" not in path.stem
        ),
    )
    def test_every_published_variant_is_inferred(self, name):
        cfg = load_config(str(CONFIGS / f"CenterMask/{name}.yaml"))
        cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ()
        cfg.MODEL.FCOS.NUM_CLASSES = 7
        cfg.MODEL.DEVICE = "meta"
        with torch.device("meta"):
            expected = build_model(cfg).state_dict()
        inferred = get_cfg()
        add_solo_d2_config(inferred)
        inferred.DATASETS.TRAIN = inferred.DATASETS.TEST = ()
        for key, value in infer_config("GeneralizedRCNN", shapes(expected)).items():
            inferred.merge_from_list([key, value])
        inferred.MODEL.DEVICE = "meta"
        with torch.device("meta"):
            assert shapes(build_model(inferred).state_dict()) == shapes(expected)
        for key in ("STAGE_WITH_DCN", "WITH_MODULATED_DCN", "CONV_BODY"):
            assert inferred.MODEL.VOVNET[key] == cfg.MODEL.VOVNET[key]
        for key in ("STRIDE_IN_1X1", "NUM_GROUPS", "DEPTH"):
            assert inferred.MODEL.RESNETS[key] == cfg.MODEL.RESNETS[key]
        assert inferred.MODEL.PIXEL_STD == cfg.MODEL.PIXEL_STD

    def test_ablations_are_inferred(self):
        cfg = load_config(
            str(CONFIGS / "CenterMask/CenterMask_Lite_V19_slim_dw_4x.yaml"),
            opts=[
                *("MODEL.FCOS.NUM_CLASSES", 7, "MODEL.FCOS.NUM_SHARE_CONVS", 1),
                *("MODEL.FCOS.NORM", "", "MODEL.FCOS.USE_SCALE", False),
                *("MODEL.FCOS.TOP_LEVELS", 0, "MODEL.FCOS.IN_FEATURES", ["p3", "p4", "p5"]),
                *("MODEL.FCOS.SIZES_OF_INTEREST", [64, 128]),
                *("MODEL.CENTERMASK.MASK_IOU_ON", False),
                *("MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK", True),
            ],
        )
        cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ()
        cfg.MODEL.DEVICE = "meta"
        with torch.device("meta"):
            expected = shapes(build_model(cfg).state_dict())
        inferred = infer_config("GeneralizedRCNN", expected)
        for key in (
            "FCOS.NUM_SHARE_CONVS",
            "FCOS.NORM",
            "FCOS.USE_SCALE",
            "FCOS.TOP_LEVELS",
            "FCOS.IN_FEATURES",
            "CENTERMASK.MASK_IOU_ON",
            "ROI_MASK_HEAD.CLS_AGNOSTIC_MASK",
        ):
            part, leaf = key.split(".")
            assert inferred[f"MODEL.{key}"] == cfg.MODEL[part][leaf], key


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
    def test_every_tensor_finds_its_place(self, tables, depth):
        weights = tables(f"vovnet{depth}_imagenet")
        source = recognize(weights)
        assert source.name == "vovnet"
        with torch.device("meta"):
            expected = shapes(body(depth).state_dict())
        assert shapes(convert(weights)) == expected
        # and where there is a pyramid around it
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
    def test_a_detector_of_any_architecture_starts_from_it(self, tables, config):
        pyramid = "build_fcos_vovnet" if "FCOS" in config else "build_vovnet"
        cfg = load_config(
            str(CONFIGS / f"{config}.yaml"),
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
        adapted = shapes(adapt_to_model(tables("vovnet19_imagenet"), expected))
        prefix = "backbone.bottom_up."
        assert adapted == {k: v for k, v in expected.items() if k.startswith(prefix)}

    @pytest.mark.golden
    def test_a_detector_that_only_names_its_backbone_so_loads_too(self, tables):
        """As vovnet-detectron2's Mask R-CNN: the other names are Detectron2's, which are ours."""
        cfg = load_config(str(CONFIGS / "MaskRCNN/MaskRCNN_V19_FPNLite_3x.yaml"))
        cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ()
        cfg.MODEL.ROI_HEADS.NUM_CLASSES = 80
        cfg.MODEL.DEVICE = "meta"
        with torch.device("meta"):
            expected = build_model(cfg).state_dict()
        prefix = "backbone.bottom_up."
        heads = {k: v for k, v in expected.items() if not k.startswith(prefix)}
        adapted = adapt_to_model({**heads, **tables("vovnet19_imagenet")}, expected)
        assert shapes(adapted) == shapes(expected)
