"""Checkpoints of the original AdaptIS convert without a tensor left over or missing."""

from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model

from solo_d2.checkpoint.checkpointer import Checkpointer
from solo_d2.checkpoint.convert import config_for, convert_checkpoint, main
from solo_d2.checkpoint.rename_rules import recognize
from solo_d2.config import load_config
from solo_d2.errors import UserError

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
STAGES = pytest.mark.parametrize("stage", ["instance", "proposals"])


def of_stage(weights, stage):
    kept = {k: v for k, v in weights.items() if not k.startswith("proposals_head.")}
    assert len(kept) < len(weights)
    return weights if stage == "proposals" else kept


@pytest.fixture(scope="module")
def weights(stand_in_weights):
    return stand_in_weights("adaptis_toy_unet")


@pytest.mark.golden
@STAGES
def test_every_tensor_finds_its_place(weights, stage):
    published = of_stage(weights, stage)
    source = recognize(published)
    assert source.name == "official_adaptis"
    cfg = config_for(published, source)
    assert cfg.MODEL.ADAPTIS.STAGE == stage
    assert cfg.MODEL.ADAPTIS.NUM_THINGS == 1
    converted = convert_checkpoint(published, source, cfg)
    counters = [name for name in published if name.endswith("num_batches_tracked")]
    assert len(converted) == len(published) - len(counters)
    # nothing is changed: the same numbers under other names
    for name, value in zip(["backbone.final.0.weight", "selection_head.adain.0.bias.weight"],
                           ["backbone.final_block.down_block.0.conv_block.0.weight",
                            "adaptis_head.adain.affine_bias.weight"], strict=True):  # fmt: skip
        assert torch.equal(converted[name], published[value])


@pytest.mark.golden
@STAGES
def test_the_toy_configs_have_a_place_for_them(weights, stage):
    published = of_stage(weights, stage)
    number = {"instance": 1, "proposals": 2}[stage]
    cfg = load_config(str(CONFIGS / f"AdaptIS/AdaptIS_UNet_rods_stage{number}.yaml"))
    cfg.MODEL.ADAPTIS.NUM_THINGS = 1
    convert_checkpoint(published, recognize(published), cfg)


@pytest.mark.golden
@pytest.mark.parametrize("remove", ["backbone.image_bn.weight", "adaptis_head.block1.3.bias"])
def test_a_missing_tensor_is_named(weights, remove):
    published = {k: v for k, v in weights.items() if k != remove}
    source = recognize(published)
    with pytest.raises(UserError, match=r"missing: \S+(weight|bias)$"):
        convert_checkpoint(published, source, config_for(published, source))


@pytest.mark.golden
def test_an_unknown_tensor_is_named(weights):
    published = {**weights, "adaptis_head.block2.0.weight": torch.zeros(1)}
    with pytest.raises(UserError, match=r"adaptis_head\.block2\.0\.weight"):
        config_for(published, recognize(published))


@pytest.mark.golden
def test_the_command_converts_and_the_result_loads(weights, tmp_path, capsys):
    torch.save(weights, tmp_path / "proposals_toy.params")
    target = tmp_path / "toy.pth"
    assert main([str(tmp_path / "proposals_toy.params"), str(target)]) == 0
    printed = capsys.readouterr().out
    assert "official_adaptis" in printed and "MODEL.ADAPTIS.STAGE proposals" in printed
    cfg = config_for(weights, recognize(weights))
    cfg.MODEL.DEVICE = "cpu"
    model = build_model(cfg)
    Checkpointer(model).load(str(target))
    expected = weights["proposals_head.convhead.6.weight"]
    assert torch.equal(model.proposal_head.predictor.weight, expected)


@pytest.mark.golden
def test_a_file_of_the_first_stage_starts_the_second(weights, tmp_path, caplog):
    """Training goes on from a published file as it is: the proposal head is new, and said to be."""
    torch.save(of_stage(weights, "instance"), tmp_path / "toy.params")
    cfg = config_for(weights, recognize(weights))
    cfg.MODEL.DEVICE = "cpu"
    model = build_model(cfg)
    before = model.proposal_head.predictor.weight.clone()
    with caplog.at_level("INFO", logger="fvcore"):
        Checkpointer(model).load(str(tmp_path / "toy.params"))
    assert torch.equal(model.proposal_head.predictor.weight, before)
    first = weights["adaptis_head.block0.0.weight"]
    assert torch.equal(model.selection_head.convs[0].weight, first)
    assert "proposal_head" in caplog.text
