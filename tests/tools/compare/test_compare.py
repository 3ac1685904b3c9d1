"""A comparison from end to end, killed in the middle and resumed."""

import io
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from solo_d2.config import load_config
from solo_d2.tools import report as one_report
from solo_d2.tools.compare import cli, comparison, measure

SMALL = ["--batch", "2", "--images-for-timing", "2", "--steps-for-timing", "1", "--gallery", "2"]


@pytest.fixture(autouse=True)
def quiet_log(monkeypatch):
    """Detectron2's log keeps the stdout of an earlier test, and says so when it is closed."""
    monkeypatch.setattr(logging, "raiseExceptions", False)


@pytest.fixture(scope="module")
def command(tiny_configs, tmp_path_factory):
    stages = f"stages={tiny_configs['stage1']}+{tiny_configs['stage2']}"
    words = [tiny_configs["solov2"], f"Mask R-CNN={tiny_configs['mask_rcnn']}", stages]
    output = tmp_path_factory.mktemp("comparison")
    return [*words, "--train", "--seeds", "2", "--output", str(output), *SMALL], output


def read_report(output):
    report = json.loads((output / "report.json").read_text())
    return report, {row["name"]: row for row in report["models"]}


def stamps(folder):
    """When each file was made that holds a result."""
    names = ("*.pth", "metrics.json", "results.json", "coco_instances_results.json", "run.json")
    return {file: file.stat().st_mtime_ns for name in names for file in folder.rglob(name)}


@pytest.fixture(scope="module")
def killed(command, tmp_path_factory):
    """(report, its rows, files) after a kill while the second model is trained."""
    arguments, output = command
    log = tmp_path_factory.mktemp("log") / "printed.txt"
    with open(log, "w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "solo_d2", "compare", *arguments],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    checkpoint = output / "Mask_R-CNN/seed3/last_checkpoint"  # written after the model
    deadline = time.monotonic() + 900
    try:
        while not checkpoint.exists():
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    return (*read_report(output), stamps(output))


@pytest.fixture(scope="module")
def finished(command, killed):
    """(report, its rows) after the same command once more."""
    arguments, output = command
    assert cli.main(arguments) == 0
    return read_report(output)


def test_a_killed_comparison_has_reported_what_was_done(killed):
    report, rows, _ = killed
    assert not report["finished"]
    status = {name: row["status"] for name, row in rows.items()}
    assert status == {"solov2": "evaluated", "Mask R-CNN": "training", "stages": "waiting"}
    assert rows["solov2"]["metrics"]["segm"]["AP"]["mean"] is not None
    assert len(rows["solov2"]["training_curves"]) == 1
    assert rows["Mask R-CNN"]["metrics"] == {}
    assert len(report["gallery"]) == 2


def test_resumed_it_loses_and_repeats_nothing(command, killed, finished):
    output = command[1]
    after, before = stamps(output), killed[2]
    kept = {file for file in before if "solov2/seed3" in str(file)}
    assert kept and all(after[file] == before[file] for file in kept)
    early = output / "Mask_R-CNN/seed3/model_0000001.pth"
    assert after[early] == before[early]
    log = (output / "Mask_R-CNN/seed3/log.txt").read_text()
    assert "Starting training from iteration 0" in log.split("Rank of current process")[1]
    resumed = log.split("Rank of current process")[2]
    assert "Starting training from iteration" in resumed
    assert "Starting training from iteration 0" not in resumed


def test_the_report_is_complete(command, finished):
    report, rows = finished
    output = command[1]
    assert report["finished"] and list(rows) == ["solov2", "Mask R-CNN", "stages"]
    assert report["data"]["images"] == 3 and report["data"]["images_train"] == 8
    assert report["settings"]["seeds"] == [3, 4]
    for name, row in rows.items():
        assert (row["status"], row["error"], row["seeds"]) == ("finished", None, [3, 4])
        for task in ("segm", "bbox"):
            ap = row["metrics"][task]["AP"]
            assert len(ap["values"]) == 2 and ap["std"] is not None
            assert row["per_class"][task].keys() == set(report["data"]["classes"])
            assert all(len(curve) == 101 for curve in row["pr_curves"][task].values())
        assert row["flops"] > 0 and row["notes"] == []
        assert row["detections"] is not None and row["input_size"] == [64, 64]
        assert row["latency"][0]["parts"].keys() == set(measure.PARTS)
        assert [x["batch"] for x in row["latency"]] == [1, 2]
        training = row["training"]
        assert training["iterations"] == 6
        assert training["step"]["median"] > 0 and training["seconds_per_iteration"]["median"] > 0
        memory = row["memory"]
        assert memory["baseline"] < min(memory["inference"], memory["training"])
        curves = [(x["seed"], x["stage"]) for x in row["training_curves"]]
        if name == "stages":
            assert curves == [(s, stage) for s in (3, 4) for stage in ("stage1", "stage2")]
        else:
            assert curves == [(3, None), (4, None)]
    # what the training's own evaluation found
    own = json.loads((output / "solov2/seed4/results.json").read_text())["segm"]
    found = rows["solov2"]["metrics"]["segm"]
    for metric in ("AP", "AP50", "APs"):
        expected = own[metric] if own[metric] == own[metric] else None
        if expected is not None:
            assert found[metric]["values"][1] == pytest.approx(expected, abs=1e-9)
    groups = {x["key"]: x["group"] for x in report["differences"]}
    assert groups["MODEL.META_ARCHITECTURE"] == "model"
    assert groups["SOLVER.MAX_ITER"] == groups["SOLVER.BASE_LR"] == "other"
    assert "forbidden" not in groups.values()
    for entry in report["gallery"]:
        assert Path(entry["file_name"]).exists()
        assert entry["predictions"].keys() == rows.keys()
    assert (output / "report.md").exists()
    page = (output / "report.html").read_text()
    assert all(name in page for name in rows)


def test_a_finished_comparison_is_only_written_again(command, finished, monkeypatch):
    arguments, output = command
    before = stamps(output)
    monkeypatch.setattr(comparison, "in_process", None)  # nothing is measured again either
    assert cli.main(arguments) == 0
    assert stamps(output) == before
    report, rows = read_report(output)
    assert report["models"] == finished[0]["models"]
    assert report["gallery"] == finished[0]["gallery"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["SOLVER.MOMENTUM", "0.5"], "SOLVER.MOMENTUM was 0.9, now it is 0.5"),
        (["MODEL.NO_SUCH_KEY", "9"], "NO_SUCH_KEY"),
    ],
)
def test_a_command_that_does_not_fit_the_folder_is_refused(
    command, finished, capsys, more, message
):
    arguments, output = command
    before = (output / "report.json").read_bytes()
    assert cli.main([*arguments[:3], *more, *arguments[3:]]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line
    assert (output / "report.json").read_bytes() == before


def test_given_weights_are_evaluated_and_a_model_that_fails_stops_no_other(
    command, finished, tiny_configs, tmp_path, capsys
):
    output = command[1]
    solov2 = str(output / "solov2/seed3/model_final.pth")
    code = cli.main(
        [
            *(tiny_configs["solo"], f"net={tiny_configs['solov2']}"),
            # of another architecture, and right; then an override
            *("--weights", solov2, solov2, "SOLVER.MAX_ITER", "1"),
            *("--output", str(tmp_path), *SMALL),
        ]
    )
    assert code == 1
    errors = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert len(errors) == 1 and "solo, evaluation" in errors[0] and "SOLOv2" in errors[0]
    report, rows = read_report(tmp_path)
    assert rows["solo"]["status"] == "failed" and "SOLOv2" in rows["solo"]["error"]
    row = rows["net"]
    assert (row["status"], row["seeds"], row["weights"]) == ("finished", [], solov2)
    values = finished[1]["solov2"]["metrics"]["segm"]["AP"]["values"]
    assert row["metrics"]["segm"]["AP"] == {"mean": values[0], "std": None, "values": values[:1]}
    assert row["training"]["iterations"] is None and "training" not in row["memory"]
    assert [x["batch"] for x in row["latency"]] == [1, 2]


def test_one_model_has_a_report_too(command, finished, tmp_path, capsys):
    run = tmp_path / "my run"
    shutil.copytree(command[1] / "solov2/seed3", run)
    assert one_report.main([str(run), *SMALL]) == 0
    assert "my run" in capsys.readouterr().out
    report, rows = read_report(run / "report")
    own = finished[1]["solov2"]["metrics"]["segm"]["AP"]["values"]
    assert rows["my run"]["metrics"]["segm"]["AP"]["values"] == own[:1]
    assert len(rows["my run"]["training_curves"]) == 1
    assert all((run / "report" / name).exists() for name in ("report.html", "per_class.csv"))


def test_a_folder_without_a_run_has_no_report(tmp_path, capsys):
    assert one_report.main([str(tmp_path)]) == 2
    assert "is not a run folder" in capsys.readouterr().err


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_shows_the_iteration_and_the_time_left(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", Terminal())
    (tmp_path / "metrics.json").write_text('{"iteration": 4, "time": 2.0}\n')
    cfg = load_config(opts=["OUTPUT_DIR", str(tmp_path), "SOLVER.MAX_ITER", "10"])
    with comparison.Progress("run 1 of 2") as bar:
        bar.show(cfg)
    printed = sys.stdout.getvalue()
    assert "run 1 of 2: " in printed and ", iteration 5 of 10, ETA 00:10" in printed


def test_a_pipe_gets_the_title_alone(tmp_path, capsys):
    with comparison.Progress("run 1 of 2") as bar:
        bar.show(load_config(opts=["OUTPUT_DIR", str(tmp_path)]))
    assert capsys.readouterr().out == "run 1 of 2\n"


def test_without_weights_or_training_nothing_starts(tiny_configs, tmp_path, capsys):
    output = tmp_path / "out"
    assert cli.main([tiny_configs["solo"], "--output", str(output)]) == 2
    assert "no weights for solo: give --train or --weights" in capsys.readouterr().err
    assert not (output / "report.json").exists()


def test_unfair_configs_need_a_word(tiny_configs, tmp_path, capsys):
    stage1 = tiny_configs["stage1"]
    words = [tiny_configs["solo"], stage1, "--train", "--output", str(tmp_path / "out")]
    assert cli.main(words) == 2
    assert "SOLVER.MAX_ITER is 6 (solo), 4 (stage1)" in capsys.readouterr().err


def test_point_rend_stands_in_the_same_table(tiny_configs, tmp_path):
    """Detectron2's, whose config keys and heads are in a project of its own."""
    words = [f"Mask R-CNN={tiny_configs['mask_rcnn']}", f"PointRend={tiny_configs['pointrend']}"]
    command = [*words, "--train", "--iterations", "2", "--output", str(tmp_path), *SMALL]
    assert cli.main(command) == 0
    report, rows = read_report(tmp_path)
    assert report["finished"] and list(rows) == ["Mask R-CNN", "PointRend"]
    assert all(row["metrics"]["segm"]["AP"]["mean"] is not None for row in rows.values())
    assert all(row["flops"] > 0 and row["notes"] == [] for row in rows.values())
    own = [x["group"] for x in report["differences"] if x["key"].startswith("INPUT.")]
    assert own == ["other"]
    config = str(tmp_path / "PointRend/seed3/config.yaml")
    assert load_config(config).MODEL.POINT_HEAD.NUM_CLASSES == 5
