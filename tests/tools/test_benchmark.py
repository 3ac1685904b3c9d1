"""The benchmark measures inference and training steps of any models."""

import json

import numpy as np
import pytest
import torch
from detectron2.structures import Instances
from PIL import Image
from tiny_models import CENTERMASK, YOLACT, tiny_model

from solo_d2.tools import benchmark
from solo_d2.tools.timing import StageClock, differences, random_input

SOLOV2 = """
VERSION: 2
MODEL:
  META_ARCHITECTURE: "SOLOv2"
  DEVICE: "cuda"
  BACKBONE: {NAME: "build_resnet_fpn_backbone"}
  RESNETS:
    DEPTH: 18
    RES2_OUT_CHANNELS: 64
    OUT_FEATURES: ["res2", "res3", "res4", "res5"]
  FPN: {IN_FEATURES: ["res2", "res3", "res4", "res5"], OUT_CHANNELS: 16}
  SOLO: {NUM_CLASSES: 3, NUM_CONVS: 1, CONV_DIM: 32}
  SOLOV2: {MASK_DIM: 32, MASK_CONV_DIM: 32}
DATASETS: {TRAIN: (), TEST: ()}
"""


@pytest.fixture
def command(tmp_path):
    (tmp_path / "config.yaml").write_text(SOLOV2)

    def run(*arguments, size=("--size", 64, 96)):
        options = ["--config-file", tmp_path / "config.yaml", *size, "--instances", 3, *arguments]
        return benchmark.main([*map(str, options)])

    return run


def rows_of(tmp_path):
    return json.loads((tmp_path / "results.json").read_text())["rows"]


def test_models_sizes_and_batches_are_measured_on_the_cpu_where_there_is_no_cuda(
    command, tmp_path, capsys, caplog, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    more = [
        "--size",
        32,
        64,
        "--images",
        1,
        2,
        "--repeat",
        2,
        "--output",
        tmp_path / "results.json",
    ]
    assert command("--config-file", tmp_path / "config.yaml", *more) == 0
    assert "CUDA is not available: running on the CPU" in caplog.text
    rows = rows_of(tmp_path)
    assert len(rows) == 2 * 2 * 2 * 2
    assert [row["what"] for row in rows[:8]] == ["inference"] * 4 + ["step, 3 objects"] * 4
    assert {(row["size"], row["images"]) for row in rows} == {
        (size, n) for size in ("64 x 96", "32 x 64") for n in (1, 2)
    }
    for row in rows:
        assert 0 < row["median"] <= row["p90"]
        assert row["images/s"] == pytest.approx(1e3 * row["images"] / row["median"])
    stages = rows[0]
    assert stages["network"] > stages["preprocess"] > 0 and stages["selection"] > 0
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(rows) and "p90" in table[0]


def test_an_image_is_read_and_resized_as_in_prediction(command, tmp_path):
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(tmp_path / "a.png")
    options = ["--only", "inference", "--repeat", 1, "--dtype", "bfloat16"]
    options += ["--image", tmp_path / "a.png", "--output", tmp_path / "results.json"]
    keys = ["MODEL.DEVICE", "cpu", "INPUT.MIN_SIZE_TEST", "40"]
    assert command(*options, *keys, size=()) == 0
    (row,) = rows_of(tmp_path)
    assert row["size"] == "40 x 60" and row["read"] > 0
    assert row["images/s with reading"] < row["images/s"]


def test_operators_are_listed_and_the_dense_part_is_compiled(command, capsys, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda part: compiled.append(part))
    keys = ["MODEL.DEVICE", "cpu", "--only", "training", "--repeat", 1]
    assert command(*keys, "--compile", "--profile", "--rows", 2) == 0
    out = capsys.readouterr().out.splitlines()
    (start,) = [i for i, line in enumerate(out) if line.endswith("according to the profiler:")]
    assert out[start + 1].endswith("% convolutions and matrix products")
    assert len([line for line in out if " ms  " in line]) == 2
    assert len(compiled) == 3  # backbone, head, mask branch


def test_a_model_without_instances_is_measured(tmp_path):
    file = tmp_path / "results.json"
    words = ["--config-file", "quick/eps_shapes.yaml", "--only", "inference", "--size", "64", "96"]
    assert (
        benchmark.main([*words, "--repeat", "1", "--output", str(file), "MODEL.DEVICE", "cpu"]) == 0
    )
    (row,) = json.loads(file.read_text())["rows"]
    assert row["found"] is None and row["network"] > 0


@pytest.mark.parametrize("settings", [YOLACT, CENTERMASK], ids=["YOLACT", "CenterMask"])
def test_stages_of_any_architecture_leave_the_model_as_it_was(settings):
    model = tiny_model(settings).eval()

    def hooks():
        return [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]

    before = set(vars(model)), hooks()
    clock = StageClock(model, torch.device("cpu"))
    with torch.no_grad():
        clock.run([{"image": torch.rand(3, 64, 96) * 255}])
    assert all(seconds > 0 for seconds in clock.seconds.values()), clock.seconds
    assert (set(vars(model)), hooks()) == before


def test_results_of_two_devices_are_compared():
    masks = torch.zeros(2, 4, 5, dtype=torch.bool)
    a = Instances((4, 5), scores=torch.tensor([0.9, 0.5]), pred_masks=masks)
    b = Instances((4, 5), scores=torch.tensor([0.9, 0.25]), pred_masks=masks.clone())
    b.pred_masks[1, 0, 0] = True
    expected = {"found": "2 of 2", "score difference": 0.25, "mask difference": 1 / 40}
    assert differences(a, b) == pytest.approx(expected)
    assert differences(a[:0], b[:0]) == {"found": "0 of 0", "score difference": 0}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["MODEL.SOLO.NUM_CLASSES", "-1", "MODEL.DEVICE", "cpu"], "number of classes is unknown"),
        (["MODEL.TYPO", "1"], "MODEL.TYPO"),
        (["--image", "none.png", "MODEL.DEVICE", "cpu"], "no file none.png"),
        (["--weights", "none.pth", "MODEL.DEVICE", "cpu"], "none.pth"),
        (["--weights", "a.pth", "--weights", "b.pth"], "1 --config-file but 2 --weights"),
        (["--dtype", "float16", "MODEL.DEVICE", "cpu"], "float16"),
    ],
)
def test_errors_are_one_line(command, capsys, arguments, message):
    assert command(*arguments) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert message in line


def test_random_instances_lie_within_the_image():
    inputs = random_input(40, 60, 20, 5)
    target = inputs["instances"]
    areas = target.gt_masks.tensor.sum((1, 2))
    boxes = target.gt_boxes.tensor
    assert ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) == areas).all()
    assert areas.min() >= 16 * 16 and target.gt_classes.max() < 5
