"""One command trains two configs in turn, the second from what the first has learned."""

import json
import os

import pytest
import torch

from solo_d2.config import load_config
from solo_d2.engine import chain_stages, is_finished
from solo_d2.errors import UserError

FOLDERS = ("first", "second")
STAGE = """
MODEL: {{META_ARCHITECTURE: "ToySegmentor", DEVICE: "cpu", WEIGHTS: ""}}
DATASETS:
  TRAIN: ("shapes_train",)
  TEST: ("shapes_val",)
  SHAPES: {{TRAIN_IMAGES: 4, VAL_IMAGES: 2, IMAGE_SIZE: [48, 64]}}
INPUT: {{MASK_FORMAT: "bitmask", MIN_SIZE_TRAIN: [48], MIN_SIZE_TEST: 48}}
SOLVER: {{IMS_PER_BATCH: 2, BASE_LR: {lr}, STEPS: [], WARMUP_ITERS: 0, MAX_ITER: 4}}
DATALOADER: {{NUM_WORKERS: 0}}
TEST: {{VIS_IMAGES: 0}}
SEED: 1
OUTPUT_DIR: "{folder}"
VERSION: 2
"""


@pytest.fixture
def stages(tmp_path):
    """Config files of two stages; the second learns nothing, so it keeps what it starts with."""
    files = []
    for name, lr in (("first", 0.1), ("second", 0.0)):
        path = tmp_path / f"{name}.yaml"
        path.write_text(STAGE.format(lr=lr, folder=tmp_path / "output" / name))
        files.append(str(path))
    return files


def run(train_net, stages, *arguments):
    first, second = stages
    words = ["--config-file", first, "--then", second, *map(str, arguments)]
    return train_net.run(train_net.parser().parse_args(words))


def weights(folder):
    return torch.load(folder / "model_final.pth", weights_only=True)["model"]


def test_the_second_stage_starts_from_the_first(train_net, stages, tmp_path, capsys):
    assert run(train_net, stages) == 0
    output = tmp_path / "output"
    first, second = weights(output / "first"), weights(output / "second")
    assert torch.equal(first["layer.weight"], second["layer.weight"])
    assert second["steps"] == 8
    assert capsys.readouterr().out.splitlines()[-1] == f"Results are in {output / 'second'}"
    for name in FOLDERS:
        assert (output / name / "results.json").exists()
        # each stage has a log of its own
        log = (output / name / "log.txt").read_text()
        assert log.count("Starting training from iteration 0") == 1


def test_resume_repeats_no_finished_stage(train_net, stages, tmp_path, capsys):
    assert run(train_net, stages) == 0
    output = tmp_path / "output"
    times = {name: (output / name / "model_final.pth").stat().st_mtime_ns for name in FOLDERS}
    (output / "second" / "results.json").unlink()  # as if killed while evaluating
    capsys.readouterr()
    assert run(train_net, stages, "--resume") == 0
    printed = capsys.readouterr().out
    assert f"{output / 'first'} is finished" in printed
    assert f"{output / 'second'} is finished" not in printed
    assert (output / "second" / "results.json").exists()
    assert (output / "first" / "model_final.pth").stat().st_mtime_ns == times["first"]


def test_an_output_folder_on_the_command_line_gets_one_for_each_stage(stages, tmp_path):
    cfgs = [load_config(f, opts=["OUTPUT_DIR", "some"]) for f in stages]
    chain_stages(cfgs, FOLDERS)
    assert [cfg.OUTPUT_DIR for cfg in cfgs] == ["some/first", "some/second"]
    assert [cfg.MODEL.WEIGHTS for cfg in cfgs] == ["", "some/first/model_final.pth"]


def test_one_stage_alone_is_left_as_it_is(stages):
    cfg = load_config(stages[0])
    expected = cfg.clone()
    chain_stages([cfg], ["first"])
    assert cfg == expected


def test_stages_that_share_a_folder_are_refused(stages):
    cfgs = [load_config(stages[0]), load_config(stages[1]), load_config(stages[0])]
    with pytest.raises(UserError, match="first, second, first need an OUTPUT_DIR each"):
        chain_stages(cfgs, ["first", "second", "first"])


def test_what_counts_as_finished(tmp_path):
    cfg = load_config(opts=["OUTPUT_DIR", str(tmp_path), "SOLVER.MAX_ITER", 10])
    assert not is_finished(cfg)
    torch.save({"model": {"x": torch.zeros(1)}, "iteration": 9}, tmp_path / "model_final.pth")
    (tmp_path / "last_checkpoint").write_text("model_final.pth")
    assert not is_finished(cfg)  # not evaluated
    (tmp_path / "results.json").write_text(json.dumps({}))
    assert is_finished(cfg)
    os.utime(tmp_path / "results.json", (0, 0))  # of an earlier training
    assert not is_finished(cfg)
    os.utime(tmp_path / "results.json")
    cfg.SOLVER.MAX_ITER = 11  # more to do
    assert not is_finished(cfg)
    cfg.SOLVER.MAX_ITER = 10
    (tmp_path / "last_checkpoint").write_text("model_0000004.pth")  # begun anew
    assert not is_finished(cfg)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--eval-only",), 2, "--eval-only"),
        (("MODEL.NO_SUCH_KEY", 1), 2, "NO_SUCH_KEY"),
        (("SOLVER.IMS_PER_BATCH", 0), 1, "SOLVER.IMS_PER_BATCH"),
    ],
)
def test_wrong_input_gives_one_line(train_net, stages, tmp_path, capsys, arguments, code, message):
    assert run(train_net, stages, *arguments) == code
    errors = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0]
    assert not (tmp_path / "output" / "second" / "model_final.pth").exists()


def test_a_missing_next_config_is_named_before_anything_is_trained(train_net, stages, tmp_path):
    assert run(train_net, (stages[0], "missing.yaml")) == 2
    assert not (tmp_path / "output").exists()
