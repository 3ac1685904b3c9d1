"""Checkpoints of the original AdaptIS, of both stages."""

import pytest
import torch
from detectron2.modeling import build_model

from solo_d2.checkpoint import Checkpointer
from solo_d2.checkpoint.convert import convert_checkpoint, find_configs
from solo_d2.checkpoint.rename_rules import recognize
from solo_d2.tools.convert import main

pytestmark = pytest.mark.golden


def first_stage(weights):
    kept = {k: v for k, v in weights.items() if not k.startswith("proposals_head.")}
    assert len(kept) < len(weights)
    return kept


@pytest.fixture(scope="module")
def weights(stand_in_weights):
    return stand_in_weights("adaptis_toy_unet")


def test_a_file_of_the_first_stage_has_configs_of_its_own(weights):
    published = first_stage(weights)
    source = recognize(published)
    names = ["AdaptIS/AdaptIS_UNet_rods_stage1.yaml", "AdaptIS/AdaptIS_UNet_tubes_stage1.yaml"]
    matches = find_configs(published, source)
    assert [match.name for match in matches] == names
    converted = convert_checkpoint(published, source, matches[0].config())
    # nothing has changed: the same numbers under other names
    for ours, theirs in {
        "backbone.final.0.weight": "backbone.final_block.down_block.0.conv_block.0.weight",
        "selection_head.adain.0.bias.weight": "adaptis_head.adain.affine_bias.weight",
    }.items():
        assert torch.equal(converted[ours], published[theirs])


def model_for(weights):
    cfg = find_configs(weights, recognize(weights))[0].config()
    cfg.MODEL.DEVICE = "cpu"
    return build_model(cfg)


def test_the_command_converts_and_the_result_loads(weights, tmp_path, capsys):
    torch.save(weights, tmp_path / "proposals_toy.params")
    target = tmp_path / "toy.pth"
    assert main([str(tmp_path / "proposals_toy.params"), str(target)]) == 0
    printed = capsys.readouterr().out
    assert "official_adaptis" in printed and "AdaptIS_UNet_rods_stage2.yaml" in printed
    model = model_for(weights)
    Checkpointer(model, require_complete=True).load(str(target))
    expected = weights["proposals_head.convhead.6.weight"]
    assert torch.equal(model.proposal_head.predictor.weight, expected)


def test_a_file_of_the_first_stage_starts_the_second(weights, tmp_path, caplog):
    """Training starts from an unmodified published file; the new proposal head is logged."""
    torch.save(first_stage(weights), tmp_path / "toy.params")
    model = model_for(weights)
    before = model.proposal_head.predictor.weight.clone()
    with caplog.at_level("WARNING", logger="fvcore"):
        Checkpointer(model).load(str(tmp_path / "toy.params"))
    assert torch.equal(model.proposal_head.predictor.weight, before)
    first = weights["adaptis_head.block0.0.weight"]
    assert torch.equal(model.selection_head.convs[0].weight, first)
    assert "proposal_head" in caplog.text
