import json
import logging
import signal
import time

import pytest

NOT_COMPARED = {"time", "data_time", "eta_seconds"}


def metrics(folder):
    lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    kept = [{k: v for k, v in line.items() if k not in NOT_COMPARED} for line in lines]
    return [json.dumps(line, sort_keys=True) for line in kept]


@pytest.fixture(scope="module")
def uninterrupted(start_process, tiny_solov2_config, tmp_path_factory):
    """Folder and printed text of a whole training of a tiny SOLOv2."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    process = start_process(
        "train_net.py", "--config-file", tiny_solov2_config, "OUTPUT_DIR", str(folder)
    )
    output = process.end()
    return folder, output


def test_a_training_leaves_what_it_should(uninterrupted):
    folder, output = uninterrupted
    assert output.splitlines()[-1] == f"Results are in {folder}"
    names = {str(path.relative_to(folder)) for path in folder.rglob("*")}
    assert {
        *(f"model_{i:07d}.pth" for i in (9, 19, 29, 39)),
        *("model_final.pth", "model_best.pth", "last_checkpoint", "config.yaml", "log.txt"),
        *(f"vis/iter_{i:07d}/shapes_val.png" for i in (14, 29, 39)),
        *("results.json", "metrics.json", "inference/coco_instances_results.json"),
    } <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert not [name for name in names if "partial" in name]
    results = json.loads((folder / "results.json").read_text())
    assert results["segm"].keys() >= {"AP", "AP50", "AP75"}


def test_after_a_kill_the_curve_continues_as_if_it_had_never_stopped(
    start_process, tiny_solov2_config, tmp_path, uninterrupted
):
    arguments = ("--config-file", tiny_solov2_config, "--resume", "OUTPUT_DIR", str(tmp_path))
    process = start_process("train_net.py", *arguments)
    # Beyond the checkpoint of iteration 9, so that there are lines to cut.
    deadline = time.monotonic() + 240
    path = tmp_path / "metrics.json"
    while not (path.exists() and '"iteration": 19' in path.read_text()):
        assert process.popen.poll() is None, process.log.read_text()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.popen.send_signal(signal.SIGKILL)
    process.end(-signal.SIGKILL)
    assert not (tmp_path / "model_final.pth").exists()

    process = start_process("train_net.py", *arguments)
    output = process.end()
    assert "Starting training from iteration 0" not in output
    assert metrics(tmp_path) == metrics(uninterrupted[0])
    iterations = [json.loads(line)["iteration"] for line in metrics(tmp_path)]
    assert iterations == [19, 14, 39, 29, 40]


@pytest.fixture(autouse=True)
def quiet_log(monkeypatch):
    """Detectron2's log keeps the stdout of an earlier test, and says so when it is closed."""
    monkeypatch.setattr(logging, "raiseExceptions", False)


def run(train_net, capsys, *arguments):
    """(exit code, lines on stderr)"""
    code = train_net.run(train_net.parser().parse_args(list(map(str, arguments))))
    return code, capsys.readouterr().err.splitlines()


def test_eval_only_takes_weights_or_the_last_checkpoint(
    train_net, capsys, tiny_solov2_config, tmp_path, uninterrupted
):
    folder, _ = uninterrupted
    expected = json.loads((folder / "results.json").read_text())
    code, errors = run(
        *(train_net, capsys, "--config-file", tiny_solov2_config, "--eval-only"),
        *("OUTPUT_DIR", tmp_path, "MODEL.WEIGHTS", folder / "model_final.pth"),
    )
    assert code == 0
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["segm"]["AP"] == pytest.approx(expected["segm"]["AP"], nan_ok=True)
    assert (tmp_path / "vis/eval_only/shapes_val.png").exists()

    (tmp_path / "last_checkpoint").write_text("nowhere.pth")
    code, errors = run(
        *(train_net, capsys, "--config-file", tiny_solov2_config, "--eval-only", "--resume"),
        *("OUTPUT_DIR", tmp_path),
    )
    assert code == 1 and "nowhere.pth" in errors[-1]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("MODEL.NO_SUCH_KEY", 1), 2, "MODEL.NO_SUCH_KEY"),
        (("SOLVER.MAX_ITER", "many"), 2, "many"),
        (("--config-file", "missing.yaml"), 2, "missing.yaml"),
        (("MODEL.META_ARCHITECTURE", "NoSuchModel"), 1, "NoSuchModel"),
        (("DATASETS.TRAIN", "('no_such_set',)"), 1, "no_such_set"),
        (("MODEL.WEIGHTS", "missing.pth"), 1, "missing.pth"),
        (("SOLVER.IMS_PER_BATCH", 0), 1, "SOLVER.IMS_PER_BATCH"),
        (("MODEL.SOLO.NUM_CLASSES", 80), 1, "80"),
        (("--data", "missing.json", "images", "missing.json", "images"), 1, "missing.json"),
    ],
)
def test_wrong_input_gives_one_line_that_names_it(
    train_net, capsys, tiny_solov2_config, tmp_path, arguments, code, message
):
    if arguments[0] != "--config-file":
        arguments = ("--config-file", tiny_solov2_config, *arguments)
    found, errors = run(train_net, capsys, *arguments, "OUTPUT_DIR", tmp_path)
    assert found == code
    lines = [line for line in errors if line.startswith("error: ")]
    assert len(lines) == 1 and message in lines[0]
    assert not any("Traceback" in line for line in errors)


def test_unknown_key_in_a_file_is_named_with_it(train_net, capsys, tmp_path):
    path = tmp_path / "odd.yaml"
    path.write_text("MODEL: {NO_SUCH_KEY: 1}")
    code, errors = run(train_net, capsys, "--config-file", path)
    assert code == 2
    assert "odd.yaml" in errors[-1] and "NO_SUCH_KEY" in errors[-1]


def test_data_on_the_command_line_enters_the_config(train_net):
    words = ["--data", "a.json", "a", "b.json", "b", "DATASETS.CUSTOM.NAME", "mine"]
    args = train_net.parser().parse_args(words)
    cfg = train_net.load_config(args.config_file, data=args.data, opts=args.opts)
    custom = cfg.DATASETS.CUSTOM
    assert [custom.TRAIN_JSON, custom.TRAIN_IMAGES] == ["a.json", "a"]
    assert [custom.VAL_JSON, custom.VAL_IMAGES, custom.NAME] == ["b.json", "b", "mine"]


def test_two_processes_follow_the_curve_of_one(
    train_net, capsys, start_process, tiny_solov2_config, tmp_path
):
    # A few iterations, since rounding errors grow quickly at the start of a training.
    common = ("--config-file", tiny_solov2_config, "SOLVER.MAX_ITER", "4", "SOLVER.STEPS", "(3,)")
    common += ("DATASETS.TEST", "()")
    assert run(train_net, capsys, *common, "OUTPUT_DIR", tmp_path / "one")[0] == 0
    options = ("--num-gpus", "2", "--dist-url", "auto")
    process = start_process("train_net.py", *options, *common, "OUTPUT_DIR", str(tmp_path / "two"))
    assert process.end().splitlines()[-1] == f"Results are in {tmp_path / 'two'}"
    one, two = (json.loads(metrics(tmp_path / name)[0]) for name in ("one", "two"))
    assert one["iteration"] == two["iteration"] == 3
    for name in ("total_loss", "loss_category", "loss_mask"):
        assert two[name] == pytest.approx(one[name], rel=1e-3)
