"""Checkpoints of the original YOLACT and YOLACT++: their special cases."""

import pytest
import torch
from detectron2.modeling import build_model

from solo_d2.checkpoint import Checkpointer
from solo_d2.checkpoint.convert import convert_checkpoint, find_configs
from solo_d2.checkpoint.rename_rules import convert, recognize
from solo_d2.tools.convert import main

pytestmark = pytest.mark.golden


def plus_r101(plus_r50, r101):
    """Names and shapes of YOLACT++ with ResNet-101, for which there is no table."""
    weights = {k: v for k, v in r101.items() if k.startswith("backbone.")}
    for stage, blocks in ((1, (0, 3)), (2, range(0, 23, 3)), (3, (0,))):
        for block in blocks:
            for leaf in ("bias", "conv_offset_mask.weight", "conv_offset_mask.bias"):
                first = f"backbone.layers.{stage}.0.conv2.{leaf}"
                weights[f"backbone.layers.{stage}.{block}.conv2.{leaf}"] = plus_r50[first]
    heads = {k: v for k, v in plus_r50.items() if not k.startswith("backbone.")}
    return {**weights, **heads}


def test_plus_with_resnet_101_has_the_published_number_of_tensors(key_table):
    weights = plus_r101(key_table("yolact_plus_r50"), key_table("yolact_r101"))
    assert len(weights) == 705
    (match,) = find_configs(weights, recognize(weights))
    assert match.name == "YOLACT/YOLACT_PLUS_R101.yaml"
    convert_checkpoint(weights, recognize(weights), match.config())


# The lists of the pyramid and the backbone are easily reversed by mistake.
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
def test_names(key_table, table, theirs, ours):
    weights = key_table(table)
    assert convert(weights)[ours] is weights[theirs]


def test_second_names_of_old_files_are_dropped(key_table):
    weights = key_table("yolact_r50")
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


def test_the_command_converts_and_the_result_loads(stand_in_weights, tmp_path, capsys):
    weights = stand_in_weights("yolact_r50")
    torch.save(weights, tmp_path / "yolact_resnet50_54_800000.pth")
    target = tmp_path / "converted.pth"
    assert main([str(tmp_path / "yolact_resnet50_54_800000.pth"), str(target)]) == 0
    printed = capsys.readouterr().out
    assert f"layout yolact, {len(weights)} tensors" in printed
    assert "YOLACT/YOLACT_R50.yaml" in printed
    cfg = find_configs(weights, recognize(weights))[0].config()
    cfg.MODEL.DEVICE = "cpu"
    model = build_model(cfg)
    Checkpointer(model, require_complete=True).load(str(target))
    state = model.state_dict()
    for name, value in convert(weights).items():
        assert torch.equal(state[name], value), name
