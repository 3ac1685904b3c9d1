import json
import logging
import multiprocessing
import os
import re
import resource
import signal
import time
from pathlib import Path

import pytest
import torch
import yaml
from detectron2.modeling import build_model

from solo_d2.checkpoint import Checkpointer
from solo_d2.config import load_config
from solo_d2.data import InstanceMapper

TOY = Path(__file__).with_name("toy.py")


@pytest.fixture(scope="module")
def toy_config(tmp_path_factory):
    """A config file of the toy model that tests/engine/toy.py registers; a second of training."""
    path = tmp_path_factory.mktemp("config") / "toy.yaml"
    path.write_text(
        """
MODEL: {META_ARCHITECTURE: "ToySegmentor", DEVICE: "cpu", WEIGHTS: "", MASK_ON: True}
DATASETS:
  TRAIN: ("shapes_train",)
  TEST: ("shapes_val",)
  SHAPES: {TRAIN_IMAGES: 12, VAL_IMAGES: 3, IMAGE_SIZE: [48, 64]}
INPUT: {MASK_FORMAT: "bitmask", MIN_SIZE_TRAIN: [48], MIN_SIZE_TEST: 48}
SOLVER:
  IMS_PER_BATCH: 2
  BASE_LR: 0.05
  STEPS: (30,)
  WARMUP_ITERS: 5
  MAX_ITER: 40
  CHECKPOINT_PERIOD: 10
DATALOADER: {NUM_WORKERS: 1}
TEST: {VIS_IMAGES: 1, EVAL_PERIOD: 10}
SEED: 5
VERSION: 2
"""
    )
    return str(path)


@pytest.fixture(scope="module")
def run_quietly(train_net, toy_config):
    """(*words, config=...) -> exit code"""

    def run(*words, config=toy_config):
        return train_net.main(["--config-file", str(config), *map(str, words)])

    return run


@pytest.fixture(scope="module")
def uninterrupted(run_quietly, tmp_path_factory):
    """Folder of an uninterrupted training."""
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert run_quietly("OUTPUT_DIR", folder) == 0
    return folder


def test_a_training_leaves_what_it_should(uninterrupted):
    names = {str(path.relative_to(uninterrupted)) for path in uninterrupted.rglob("*")}
    assert {
        *(f"model_{i:07d}.pth" for i in (9, 19, 29, 39)),
        *("model_final.pth", "model_best.pth", "last_checkpoint", "config.yaml", "log.txt"),
        *(f"vis/iter_{i:07d}/shapes_val.png" for i in (9, 19, 29, 39)),
        *("results.json", "metrics.json", "inference/coco_instances_results.json"),
    } <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert not [name for name in names if "partial" in name]
    results = json.loads((uninterrupted / "results.json").read_text())
    assert results["segm"].keys() >= {"AP", "AP50", "AP75"}
    lines = (uninterrupted / "metrics.json").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in lines if "total_loss" in line] == [19, 39]


@pytest.mark.parametrize(("moment", "last"), [("checkpoint", 9), ("evaluation", 19), ("step", 19)])
def test_a_kill_at_any_moment_loses_nothing(
    run_quietly, toy_arm, tmp_path, uninterrupted, moment, last
):
    folder = tmp_path / "run"

    def train_and_die():
        toy_arm(moment)
        run_quietly("OUTPUT_DIR", folder)

    process = multiprocessing.get_context("fork").Process(target=train_and_die)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert (folder / "last_checkpoint").read_text() == f"model_{last:07d}.pth"
    assert (folder / "vis/iter_0000019").exists() == (moment == "step")

    assert run_quietly("--resume", "OUTPUT_DIR", folder) == 0
    log = (folder / "log.txt").read_text()
    assert f"Starting training from iteration {last + 1}\n" in log
    assert (folder / "vis/iter_0000019").exists()
    for name in ("model_final.pth", "model_best.pth"):
        whole, cut = (torch.load(x / name, weights_only=True) for x in (uninterrupted, folder))
        assert whole["iteration"] == cut["iteration"]
        for key, value in whole["model"].items():
            torch.testing.assert_close(cut["model"][key], value)
    whole, cut = (json.loads((x / "results.json").read_text()) for x in (uninterrupted, folder))
    assert whole == cut


def test_ctrl_c_is_one_line_and_keeps_the_last_checkpoint(start_process, toy_config, tmp_path):
    process = start_process(
        *(TOY, "--config-file", toy_config, "OUTPUT_DIR", str(tmp_path / "run")),
        *("SOLVER.MAX_ITER", "100000", "TEST.EVAL_PERIOD", "0"),
    )
    deadline = time.monotonic() + 240
    while not (tmp_path / "run/last_checkpoint").exists():
        assert process.popen.poll() is None, process.log.read_text()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.popen.send_signal(signal.SIGINT)
    output = process.end(130)
    assert "interrupted; --resume continues from the last checkpoint" in output
    assert "Traceback" not in output


@pytest.fixture(autouse=True)
def quiet_log(monkeypatch):
    """Detectron2's log holds the stdout of an earlier test and complains once it is closed."""
    monkeypatch.setattr(logging, "raiseExceptions", False)


@pytest.fixture
def run(run_quietly, capsys):
    """(*words, config=...) -> (exit code, lines on stderr)"""

    def run(*words, **options):
        return run_quietly(*words, **options), capsys.readouterr().err.splitlines()

    return run


SHORT = ("SOLVER.MAX_ITER", 2, "SOLVER.STEPS", (), "DATALOADER.NUM_WORKERS", 0)


def test_eval_only_takes_weights_or_the_last_checkpoint(run, tmp_path, uninterrupted):
    expected = json.loads((uninterrupted / "results.json").read_text())
    code, errors = run(
        *("--eval-only", "OUTPUT_DIR", tmp_path, "MODEL.WEIGHTS", uninterrupted / "model_final.pth")
    )
    assert code == 0
    assert json.loads((tmp_path / "results.json").read_text()) == expected
    assert (tmp_path / "vis/eval_only/shapes_val.png").exists()

    (tmp_path / "last_checkpoint").write_text("nowhere.pth")
    code, errors = run("--eval-only", "--resume", "OUTPUT_DIR", tmp_path)
    assert code == 1 and "nowhere.pth" in errors[-1]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("MODEL.NO_SUCH_KEY", 1), 2, "MODEL.NO_SUCH_KEY"),
        (("SOLVER.MAX_ITER", "many"), 2, "many"),
        (("--num-gpus", 99), 2, "--num-gpus is 99"),
        (("--num-machines", 2), 2, "--dist-url"),
        (("--num-machines", 2, "--machine-rank", 2), 2, "--machine-rank must be from 0 to 1"),
        (("MODEL.META_ARCHITECTURE", "NoSuchModel"), 1, "NoSuchModel"),
        (("DATASETS.TRAIN", "('no_such_set',)"), 1, "no_such_set"),
        (("MODEL.WEIGHTS", "missing.pth"), 1, "missing.pth"),
        (("SOLVER.IMS_PER_BATCH", 0), 1, "SOLVER.IMS_PER_BATCH"),
        (("SOLVER.OPTIMIZER", "Adam"), 1, "SOLVER.OPTIMIZER must be 'SGD' or 'AdamW', not 'Adam'"),
        (("SOLVER.LR_SCHEDULER_NAME", "Odd"), 1, "Odd"),
        (("SOLVER.CLIP_TOTAL_GRAD_NORM", -1.0), 1, "SOLVER.CLIP_TOTAL_GRAD_NORM must be positive"),
        (("MODEL.META_ARCHITECTURE", "SOLO", "MODEL.SOLO.NUM_CLASSES", 80), 1, "80"),
        (
            ("DATASETS.TRAIN", "('coco_2017_train',)", "DATASETS.TEST", "()"),
            *(1, "Set DETECTRON2_DATASETS"),
        ),
        (
            ("DATASETS.TRAIN", "('nuclei_train',)", "DATASETS.TEST", "('nuclei_val',)"),
            *(1, "pass your own with --data"),
        ),
        (("--epochs", 0), 1, "epochs must be a positive number, not 0"),
        (("MODEL.META_ARCHITECTURE", "SOLO", "TEST.AUG.ENABLED", True), 1, "TEST.AUG.ENABLED"),
        (("--data", "missing.json", "images", "missing.json", "images"), 1, "missing.json"),
    ],
)
def test_wrong_input_gives_one_line_that_names_it(
    run, tmp_path, monkeypatch, arguments, code, message
):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "nowhere"))
    found, errors = run(*arguments, "OUTPUT_DIR", tmp_path)
    assert found == code
    lines = [line for line in errors if line.startswith("error: ")]
    assert len(lines) == 1 and message in lines[0]
    assert not any("Traceback" in line for line in errors)


def test_wrong_input_in_a_file_is_named_with_it(run, tmp_path):
    path = tmp_path / "odd.yaml"
    code, errors = run(config=path)
    assert code == 2 and "odd.yaml" in errors[-1]
    path.write_text("MODEL: {NO_SUCH_KEY: 1}")
    code, errors = run(config=path)
    assert code == 2
    assert "odd.yaml" in errors[-1] and "NO_SUCH_KEY" in errors[-1]


def test_a_packaged_config_is_found_by_its_name(run, tmp_path):
    toy = ("MODEL.META_ARCHITECTURE", "ToySegmentor", "DATASETS.SHAPES.IMAGE_SIZE", (48, 64))
    few = ("DATASETS.SHAPES.TRAIN_IMAGES", 12, "DATASETS.SHAPES.VAL_IMAGES", 3)
    code, _ = run(*toy, *few, *SHORT, "OUTPUT_DIR", tmp_path, config="quick/solo_shapes.yaml")
    assert code == 0
    assert "quick/solo_shapes.yaml" in (tmp_path / "log.txt").read_text()


def test_an_error_in_a_plug_in_keeps_its_traceback(run, tmp_path, toy_model):
    for error in (KeyError("p5"), ValueError("wrong"), TypeError("wrong")):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(type(error)):

            def fail(*args, error=error):
                raise error

            patch.setattr(toy_model, "forward", fail)
            run(*SHORT, "--overwrite", "OUTPUT_DIR", tmp_path)


def test_a_process_among_several_says_what_is_wrong_in_one_line(train_net, capsys, tmp_path):
    args = train_net.parse(train_net._parser(), ["SOLVER.MAX_ITER", "0"])
    cfg = train_net.load_config("", opts=args.opts)
    with pytest.raises(SystemExit, match="1"):
        train_net.one_of_several(cfg, args)
    assert capsys.readouterr().err.startswith("error: SOLVER.MAX_ITER is 0")


def test_a_killed_loading_process_is_one_line(run, tmp_path, monkeypatch):
    monkeypatch.setattr(
        InstanceMapper, "__call__", lambda *args: os.kill(os.getpid(), signal.SIGKILL)
    )
    code, errors = run(*SHORT, "DATALOADER.NUM_WORKERS", 1, "OUTPUT_DIR", tmp_path)
    assert code == 1 and errors[-1].startswith("error: DataLoader worker")


def test_a_folder_with_a_training_is_not_used_for_another_one(run, tmp_path):
    folder = tmp_path / "run"
    assert run(*SHORT, "OUTPUT_DIR", folder)[0] == 0
    code, errors = run(*SHORT, "OUTPUT_DIR", folder)
    assert code == 1 and "--resume" in errors[-1] and "--overwrite" in errors[-1]
    (folder / "metrics.json").write_text("old\n")
    assert run(*SHORT, "--overwrite", "OUTPUT_DIR", folder)[0] == 0
    assert "old" not in (folder / "metrics.json").read_text()
    assert run("--resume", *SHORT, "OUTPUT_DIR", folder)[0] == 0


def test_a_second_training_in_a_folder_is_refused(run, train_net, tmp_path):
    context = multiprocessing.get_context("fork")
    begun = context.Event()

    def hold():
        with train_net.training_folder(str(tmp_path), resume=False, overwrite=False):
            begun.set()
            signal.pause()

    process = context.Process(target=hold)
    process.start()
    assert begun.wait(60)
    code, errors = run(*SHORT, "--resume", "OUTPUT_DIR", tmp_path)
    process.kill()
    process.join()
    assert code == 1 and f"another process is training in {tmp_path}" in errors[-1]
    assert run(*SHORT, "--resume", "OUTPUT_DIR", tmp_path)[0] == 0


def test_a_full_disk_is_one_line_and_leaves_no_broken_checkpoint(run, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with pytest.MonkeyPatch.context() as patch:

        def small_files(*args, **options):
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
            return save(*args, **options)

        save = torch.save
        patch.setattr(torch, "save", small_files)
        try:
            code, errors = run(*SHORT, "OUTPUT_DIR", tmp_path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGXFSZ, handler)
    assert code == 1 and errors[-1].startswith("error: ") and "File too large" in errors[-1]
    assert not list(tmp_path.glob("*.pth")) and not list(tmp_path.glob("*.partial"))


def test_options_may_stand_anywhere_among_keys_and_values(train_net, capsys):
    words = ["SEED", "1", "--data", "a.json", "a", "b.json", "b", "DATASETS.CUSTOM.NAME", "mine"]
    args = train_net.parse(train_net._parser(), [*words, "--resume", "SOLVER.BASE_LR", "-1"])
    assert args.data == ["a.json", "a", "b.json", "b"] and args.resume
    assert args.opts == ["SEED", "1", "DATASETS.CUSTOM.NAME", "mine", "SOLVER.BASE_LR", "-1"]
    for words, message in (
        (["--no-such"], "arguments: --no-such"),
        (["SEED"], "SEED has no value"),
    ):
        with pytest.raises(SystemExit, match="2"):
            train_net.parse(train_net._parser(), words)
        assert message in capsys.readouterr().err


def test_the_console_is_short_and_the_log_is_complete(run_quietly, tmp_path, capsys):
    assert run_quietly(*SHORT, "OUTPUT_DIR", tmp_path) == 0
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) < 30 and "\x1b" not in printed
    assert "Starting training from iteration 0" in printed
    assert re.search(r"epoch 0\.\d/0\.\d .*iter: 1  ", printed)
    table = [line.split() for line in printed.splitlines() if line.startswith(("segm ", "    "))]
    assert table[0] == ["AP", "AP50", "AP75", "APs", "APm", "APl"]
    assert table[1][0] == "segm" and len(table[1]) == 7
    assert printed.endswith(f"Results are in {tmp_path}\n")
    log = (tmp_path / "log.txt").read_text()
    for text in ("Running with full config", "Model:\n", "Average Precision", "copypaste"):
        assert text in log and text not in printed


def test_epochs_set_the_schedule(run, tmp_path):
    assert run("--epochs", "0.5", "OUTPUT_DIR", tmp_path)[0] == 0
    saved = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert saved["SOLVER"]["MAX_ITER"] == 3 and saved["SOLVER"]["STEPS"] == [2]
    assert saved["TEST"]["EVAL_PERIOD"] == 1


def test_weights_for_other_classes_lose_only_the_class_layers(run_quietly, tmp_path, capsys):
    name = "quick/solov2_shapes.yaml"
    sets = ["DATASETS.TRAIN", "()", "DATASETS.TEST", "()"]
    model = build_model(load_config(name, opts=["MODEL.SOLO.NUM_CLASSES", "3", *sets]))
    Checkpointer(model, str(tmp_path), thing_classes=["a", "b", "c"]).save("coco")
    few = ("DATASETS.SHAPES.TRAIN_IMAGES", 12, "DATASETS.SHAPES.VAL_IMAGES", 3)
    small = ("DATASETS.SHAPES.IMAGE_SIZE", (48, 64), "SOLVER.IMS_PER_BATCH", 2)
    weights = ("MODEL.WEIGHTS", tmp_path / "coco.pth", "OUTPUT_DIR", tmp_path / "run")
    assert run_quietly(*few, *small, *SHORT, *weights, config=name) == 0
    (line,) = [x for x in capsys.readouterr().out.splitlines() if "fit only in part" in x]
    assert "the file is for 3 classes, the model for 5" in line
    assert "head.category_pred.weight" in line and "not in the file" not in line


def test_data_on_the_command_line_enters_the_config(train_net):
    cfg = train_net.load_config("", data=["a.json", "a", "b.json", "b"])
    custom = cfg.DATASETS.CUSTOM
    assert [custom.TRAIN_JSON, custom.TRAIN_IMAGES] == ["a.json", "a"]
    assert [custom.VAL_JSON, custom.VAL_IMAGES] == ["b.json", "b"]
