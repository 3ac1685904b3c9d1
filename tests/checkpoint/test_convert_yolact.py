"""Checkpoints of the original YOLACT and YOLACT++ convert without a tensor left over or missing."""

from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model

from solo_d2.checkpoint.checkpointer import Checkpointer
from solo_d2.checkpoint.convert import config_for, convert_checkpoint, main
from solo_d2.checkpoint.rename_rules import convert, recognize
from solo_d2.checkpoint.sources import SOURCES
from solo_d2.config import load_config
from solo_d2.errors import UserError

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "YOLACT"
# The key table of a published model -> our config for it.
TABLES = {
    "yolact_r50": "YOLACT_R50",
    "yolact_r101": "YOLACT_R101",
    "yolact_darknet53": "YOLACT_DarkNet53",
    "yolact_plus_r50": "YOLACT_PLUS_R50",
}
BACKBONES = {
    "yolact_r50": "build_resnet_backbone",
    "yolact_r101": "build_resnet_backbone",
    "yolact_darknet53": "build_darknet_backbone",
    "yolact_plus_r50": "build_deform_resnet_backbone",
}
every_table = pytest.mark.parametrize("table", TABLES)


@pytest.fixture(scope="module")
def published(reference_dir):
    """Key table -> tensors that differ from each other, without memory for their numbers."""

    def make(table: str) -> dict[str, torch.Tensor]:
        lines = (reference_dir / "keys" / f"{table}.keys.tsv").read_text().splitlines()[1:]
        weights = {}
        for i, line in enumerate(lines):
            name, shape, *_ = line.split("\t")
            sizes = [] if shape == "-" else [int(size) for size in shape.split("x")]
            weights[name] = torch.tensor(float(i)).expand(sizes)
        return weights

    return make


def plus_r101(plus_r50, r101):
    """Names and shapes of YOLACT++ with ResNet-101, of which there is no table."""
    weights = {k: v for k, v in r101.items() if k.startswith("backbone.")}
    for stage, blocks in ((1, (0, 3)), (2, range(0, 23, 3)), (3, (0,))):
        for block in blocks:
            for leaf in ("bias", "conv_offset_mask.weight", "conv_offset_mask.bias"):
                first = f"backbone.layers.{stage}.0.conv2.{leaf}"
                weights[f"backbone.layers.{stage}.{block}.conv2.{leaf}"] = plus_r50[first]
    heads = {k: v for k, v in plus_r50.items() if not k.startswith("backbone.")}
    return {**weights, **heads}


@pytest.mark.golden
@every_table
def test_every_tensor_finds_its_place(published, table):
    weights = published(table)
    source = recognize(weights)
    assert source.architecture == "YOLACT"
    cfg = config_for(weights, source)
    assert cfg.MODEL.YOLACT.NUM_CLASSES == 80
    assert cfg.MODEL.BACKBONE.NAME == BACKBONES[table]
    converted = convert_checkpoint(weights, source, cfg)
    counters = [name for name in weights if name.endswith("num_batches_tracked")]
    assert len(converted) == len(weights) - len(counters)
    assert len({value.flatten()[0].item() for value in converted.values()}) == len(converted)


@pytest.mark.golden
@every_table
def test_the_config_of_the_variant_has_a_place_for_them(published, table):
    weights = published(table)
    cfg = load_config(str(CONFIGS / f"{TABLES[table]}.yaml"))
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ()
    cfg.MODEL.YOLACT.NUM_CLASSES = 80
    convert_checkpoint(weights, recognize(weights), cfg)
    # and what the shapes tell is what the config says
    inferred = config_for(weights, recognize(weights))
    for key in ("PIXEL_MEAN", "PIXEL_STD", "YOLACT"):
        assert cfg.MODEL[key] == inferred.MODEL[key]
    assert cfg.MODEL.BACKBONE.NAME == inferred.MODEL.BACKBONE.NAME
    if table != "yolact_darknet53":
        for key in ("DEPTH", "STRIDE_IN_1X1", "OUT_FEATURES"):
            assert cfg.MODEL.RESNETS[key] == inferred.MODEL.RESNETS[key]


@pytest.mark.golden
def test_plus_with_resnet_101_has_the_published_number_of_tensors(published):
    weights = plus_r101(published("yolact_plus_r50"), published("yolact_r101"))
    assert len(weights) == 705
    cfg = config_for(weights, recognize(weights))
    assert cfg.MODEL.RESNETS.DEFORM_INTERVAL == 3 and cfg.MODEL.RESNETS.DEFORM_BIAS
    convert_checkpoint(weights, recognize(weights), cfg)
    ours = load_config(str(CONFIGS / "YOLACT_PLUS_R101.yaml"))
    ours.DATASETS.TRAIN = ours.DATASETS.TEST = ()
    ours.MODEL.YOLACT.NUM_CLASSES = 80
    convert_checkpoint(weights, recognize(weights), ours)


# The pyramid and the backbone have the lists that are easily taken the wrong way around.
@pytest.mark.golden
@pytest.mark.parametrize(
    "table, theirs, ours",
    [
        ("yolact_r50", "fpn.lat_layers.0.weight", "fpn.lateral5.weight"),
        ("yolact_r50", "fpn.lat_layers.2.weight", "fpn.lateral3.weight"),
        ("yolact_r50", "fpn.pred_layers.0.bias", "fpn.output5.bias"),
        ("yolact_r50", "fpn.downsample_layers.1.weight", "fpn.downsample7.weight"),
        ("yolact_r50", "proto_net.8.weight", "protonet.conv3.weight"),
        ("yolact_r50", "proto_net.10.weight", "protonet.predictor.weight"),
        ("yolact_r50", "prediction_layers.0.upfeature.0.bias", "head.shared.bias"),
        ("yolact_r50", "prediction_layers.0.conf_layer.bias", "head.class_logits.bias"),
        ("yolact_r50", "semantic_seg_conv.bias", "semantic_pred.bias"),
        ("yolact_r50", "backbone.bn1.bias", "backbone.stem.conv1.norm.bias"),
        (
            "yolact_r50",
            "backbone.layers.0.0.downsample.1.bias",
            "backbone.res2.0.shortcut.norm.bias",
        ),
        ("yolact_r101", "backbone.layers.2.22.conv3.weight", "backbone.res4.22.conv3.weight"),
        ("yolact_plus_r50", "backbone.layers.3.2.conv2.bias", "backbone.res5.2.conv2.bias"),
        (
            "yolact_plus_r50",
            "backbone.layers.1.3.conv2.conv_offset_mask.weight",
            "backbone.res3.3.conv2_offset.weight",
        ),
        ("yolact_plus_r50", "maskiou_net.maskiou_net.8.bias", "mask_iou_head.conv4.bias"),
        ("yolact_plus_r50", "maskiou_net.maskiou_net.10.bias", "mask_iou_head.predictor.bias"),
        ("yolact_darknet53", "backbone._preconv.1.bias", "backbone.stem.norm.bias"),
        ("yolact_darknet53", "backbone.layers.4.0.0.weight", "backbone.res5.0.weight"),
        ("yolact_darknet53", "backbone.layers.4.0.1.bias", "backbone.res5.0.norm.bias"),
        ("yolact_darknet53", "backbone.layers.2.8.conv1.1.bias", "backbone.res3.8.conv1.norm.bias"),
    ],
)
def test_names(published, table, theirs, ours):
    weights = published(table)
    assert convert(weights)[ours] is weights[theirs]


@pytest.mark.golden
def test_second_names_of_old_files_are_dropped(published):
    weights = published("yolact_r50")
    expected = convert(weights)
    old = dict(weights)
    for name, value in weights.items():
        if name.startswith("backbone.layers.0."):
            old[name.replace("backbone.layers.0.", "backbone.layer1.")] = value
    for level in (2, 3):
        for kind in ("weight", "bias"):
            old[f"fpn.downsample_layers.{level}.{kind}"] = torch.zeros(1)
    assert len(old) > len(weights) + 4
    assert convert(old) == expected


@pytest.mark.golden
@every_table
@pytest.mark.parametrize(
    "remove", ["fpn.pred_layers.1.bias", "proto_net.4.weight", "semantic_seg_conv.bias"]
)
def test_a_missing_tensor_is_named(published, table, remove):
    weights = {k: v for k, v in published(table).items() if k != remove}
    source = recognize(weights)
    renamed = next(iter(convert({remove: None}, source)))
    with pytest.raises(UserError, match=f"missing: {renamed}$"):
        convert_checkpoint(weights, source, config_for(weights, source))


@pytest.mark.golden
@pytest.mark.parametrize(
    "name", ["backbone.layers.4.0.conv1.weight", "proto_net.6.bias", "fpn.lat_layers.3.bias"]
)
def test_an_unknown_tensor_is_named(published, name):
    weights = {**published("yolact_r50"), name: torch.zeros(1)}
    with pytest.raises(UserError, match=name):
        config_for(weights, recognize(weights))


@pytest.mark.golden
def test_the_command_converts_and_the_result_loads(stand_in_weights, tmp_path, capsys):
    weights = stand_in_weights("yolact_r50")
    torch.save(weights, tmp_path / "yolact_resnet50_54_800000.pth")
    target = tmp_path / "converted.pth"
    assert main([str(tmp_path / "yolact_resnet50_54_800000.pth"), str(target)]) == 0
    printed = capsys.readouterr().out
    assert f"layout yolact, {len(weights)} tensors" in printed
    assert "INPUT.FORMAT RGB" in printed and "MODEL.RESNETS.STRIDE_IN_1X1 False" in printed
    cfg = config_for(weights, SOURCES["yolact"])
    cfg.MODEL.DEVICE = "cpu"
    model = build_model(cfg)
    Checkpointer(model).load(str(target))
    state = model.state_dict()
    for name, value in convert(weights).items():
        assert torch.equal(state[name], value), name
