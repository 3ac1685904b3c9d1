"""The benchmark profiles a training step and an inference of any model."""

import numpy as np
import pytest
import torch
from PIL import Image

from solo_d2.tools import benchmark

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

    def run(*arguments):
        options = ["--config-file", str(tmp_path / "config.yaml"), "--size", "64", "96"]
        return benchmark.main([*options, "--instances", "3", *map(str, arguments)])

    return run


def test_training_and_inference_are_profiled_on_the_cpu_where_there_is_no_cuda(
    command, capsys, caplog, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command("--rows", "2") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("config.yaml, 64 x 96, cpu")
    assert "CUDA is not available: running on the CPU" in caplog.text
    (step,) = [i for i, line in enumerate(lines) if line.startswith("training step, 3 instances")]
    assert "loss_mask" in lines[step]
    assert lines[step + 1].endswith("% convolutions and matrix products")
    (inference,) = [i for i, line in enumerate(lines) if line.startswith("inference, ")]
    operators = [line for line in lines[inference:] if " ms  " in line]
    assert len(operators) == 2
    assert lines[-1].startswith("peak memory: ")


def test_one_of_the_two_with_an_image(command, tmp_path, capsys):
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(tmp_path / "a.png")
    assert command("MODEL.DEVICE", "cpu", "--only", "inference", "--image", tmp_path / "a.png") == 0
    out = capsys.readouterr().out
    assert "inference, " in out and "training step" not in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["MODEL.SOLO.NUM_CLASSES", "-1", "MODEL.DEVICE", "cpu"], "number of classes is unknown"),
        (["MODEL.TYPO", "1"], "MODEL.TYPO"),
        (["--image", "none.png", "MODEL.DEVICE", "cpu"], "no file none.png"),
        (["--weights", "none.pth", "MODEL.DEVICE", "cpu"], "none.pth"),
    ],
)
def test_errors_are_one_line(command, capsys, arguments, message):
    assert command(*arguments) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert message in line


def test_random_instances_lie_within_the_image():
    inputs = benchmark.random_input(40, 60, 20, 5)
    target = inputs["instances"]
    areas = target.gt_masks.tensor.sum((1, 2))
    boxes = target.gt_boxes.tensor
    assert ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) == areas).all()
    assert areas.min() >= 16 * 16 and target.gt_classes.max() < 5
