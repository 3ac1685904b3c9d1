import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from detectron2.modeling import GeneralizedRCNN, build_model
from detectron2.structures import Instances
from torch import nn

from solo_d2.config import load_config
from solo_d2.data import setup_datasets
from solo_d2.errors import UserError
from solo_d2.layers.deform_conv import DeformConv2d
from solo_d2.tools.compare import measure
from solo_d2.tools.compare.process import in_process
from solo_d2.tools.timing import StageClock


@pytest.fixture(scope="module")
def models(tiny_configs):
    """Name -> (config, untrained model)."""
    found = {}
    for name in ("solov2", "mask_rcnn"):
        cfg = load_config(tiny_configs[name])
        setup_datasets(cfg)
        torch.manual_seed(0)
        found[name] = cfg, build_model(cfg).eval()
    return found


def hook_ids(model):
    return [[*m._forward_hooks, *m._forward_pre_hooks] for m in model.modules()]


@pytest.mark.parametrize("name", ["solov2", "mask_rcnn"])
def test_parts_of_an_inference_are_timed_and_leave_no_hooks(models, name):
    cfg, model = models[name]
    batch = measure.sample_inputs(cfg, 2)
    hooks = hook_ids(model)
    with torch.no_grad():
        seconds = measure.time_stages(model, batch)
    assert tuple(seconds) == measure.PARTS
    assert all(x > 0 for x in seconds.values())
    assert hook_ids(model) == hooks


class Head(nn.Module):
    """Has a second way in, as SOLO's and AdaptIS's heads have."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 1)

    def select(self, x):
        return self.conv(x)


def test_modules_entered_by_another_method_count_as_network():
    model = nn.Module()
    model.backbone, model.head = nn.Identity(), Head()
    clock = StageClock(model, torch.device("cpu"))
    with clock.attached():
        model.head.select(torch.zeros(1, 1, 2, 2))
    assert clock.seconds["network"] > 0


def test_models_take_turns_and_each_begins_a_round():
    calls = []
    measure._in_turn(["a", "b", "c"], 2, lambda name, number: calls.append((name, number)), {})
    rounds = [calls[i : i + 3] for i in range(0, len(calls), 3)]
    assert len(rounds) == measure._WARM_UP + 2
    assert all({name for name, _ in x} == {"a", "b", "c"} for x in rounds)
    assert [x[0][0] for x in rounds[:4]] == ["a", "b", "c", "a"]
    assert [{n for _, n in x} for x in rounds] == [{0}] * measure._WARM_UP + [{0}, {1}]


def test_a_model_that_fails_is_left_out_and_named():
    def run(name, number):
        if name == "b" and number == 1:
            raise RuntimeError("out of\nmemory")
        return number

    notes = {"a": [], "b": []}
    assert measure._in_turn(["a", "b"], 3, run, notes) == {"a": [0, 1, 2]}
    assert notes == {"a": [], "b": ["not timed: out of memory"]}
    assert measure._in_turn([], 2, run, notes) == {}


def test_latencies_are_per_image_and_in_parts(models):
    batches = {
        n: measure.make_batches(measure.sample_inputs(c, 3), 2) for n, (c, _) in models.items()
    }
    rows = measure.time_inference({n: model for n, (_, model) in models.items()}, batches, {})
    assert rows.keys() == models.keys()
    for row in rows.values():
        assert (row["batch"], row["images"]) == (2, 6)
        assert tuple(row["parts"]) == measure.PARTS
        assert 0 < row["total"]["q1"] <= row["total"]["median"] <= row["total"]["q3"]
    json.dumps(rows, allow_nan=False)


def test_batches_have_one_size_and_images_may_come_again():
    assert measure.make_batches(list("abc"), 1) == [["a"], ["b"], ["c"]]
    assert measure.make_batches(list("abc"), 2) == [["a", "b"], ["c", "a"], ["b", "c"]]
    assert [len(x) for x in measure.make_batches(list("abcdefghi"), 2)] == [2] * 5


def test_the_inputs_are_spread_over_the_test_set_and_resized_as_the_config_says(models):
    cfg = models["solov2"][0].clone()
    cfg.INPUT.MIN_SIZE_TEST = 32
    inputs = measure.sample_inputs(cfg, 2)
    assert [x["image_id"] for x in inputs] == [1, 3]
    assert inputs[0]["image"].shape[-2:] == (32, 32)
    assert inputs[0]["height"] == 64


def test_training_steps_are_timed_without_changing_parameters(models):
    before = {name: [p.clone() for p in model.parameters()] for name, (_, model) in models.items()}
    rows = measure.time_training(
        {name: model for name, (_, model) in models.items()},
        {name: cfg for name, (cfg, _) in models.items()},
        2,
        {},
    )
    for name, (_, model) in models.items():
        assert rows[name]["median"] > 0
        assert all(torch.equal(a, b) for a, b in zip(before[name], model.parameters()))
        assert any(p.grad is not None for p in model.parameters())
        model.eval()


class Countable(nn.Module):
    """A conv, a deformable one, and a matrix product outside of modules."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.deform = DeformConv2d(4, 6, kernel_size=3, padding=1, bias=False)

    def forward(self, batch):
        x = self.deform(self.conv(batch[0]["image"][None]))
        result = Instances((4, 5))
        result.scores = (torch.ones(7, 6) @ x[0].flatten(1)).sum(dim=1)
        return [{"instances": result}]


def test_flops_are_multiply_adds_of_the_modules_and_of_the_rest():
    model = Countable()
    found = measure.count_flops(model, [{"image": torch.rand(3, 4, 5), "height": 4, "width": 5}])
    offset = sum(p.numel() for n, p in model.deform.named_parameters() if n == "offset.weight")
    assert found["flops"] == (4 * 3 * 9 + 6 * 4 * 9 + offset) * 20
    assert found["flops_post"] == 7 * 6 * 20
    assert found["detections"] == 7


def test_flops_of_the_network_do_not_depend_on_what_is_found(tiny_configs):
    cfg = load_config(tiny_configs["solov2"])
    setup_datasets(cfg)
    found = {}
    for threshold in (1.0, 0.0):
        cfg.MODEL.SOLO.SCORE_THRESH_TEST = threshold
        cfg.MODEL.SOLO.UPDATE_THRESH_TEST = 0.0
        torch.manual_seed(0)
        model = build_model(cfg).eval()
        found[threshold] = measure.count_flops(model, measure.sample_inputs(cfg, 1))
    assert found[1.0]["detections"] == 0 and found[0.0]["detections"] > 0
    assert found[1.0]["flops"] == found[0.0]["flops"] > 0
    assert found[1.0]["flops_post"] < found[0.0]["flops_post"]


def test_flops_of_adaptis_are_those_of_the_padded_image(tiny_configs, tmp_path):
    file = tmp_path / "adaptis.yaml"
    file.write_text(
        f"_BASE_: {tiny_configs['solo']}\n"
        "MODEL:\n  META_ARCHITECTURE: AdaptIS\n"
        "  ADAPTIS: {IN_FEATURES: [p2, p3], HEAD: cityscapes, FUSE_DIM: 16}\n"
    )
    cfg = load_config(str(file))
    setup_datasets(cfg)
    model = build_model(cfg).eval()
    whole, padded = (
        measure.count_flops(model, [{"image": torch.zeros(3, h, w), "height": h, "width": w}])
        for h, w in ((64, 64), (50, 64))
    )
    assert padded["flops"] == whole["flops"] > 0
    with torch.no_grad():  # the model takes the images of a batch one by one
        assert all(measure.time_stages(model, measure.sample_inputs(cfg, 2)).values())


def test_a_subclass_with_stages_of_its_own_is_timed_as_a_whole(models):
    class Panoptic(GeneralizedRCNN):
        def inference(self, batched_inputs):
            return []

    assert measure._has_stages(models["mask_rcnn"][1])
    assert measure._has_stages(models["solov2"][1])
    assert not measure._has_stages(Panoptic.__new__(Panoptic))


def test_quartiles():
    found = measure.quartiles([4.0, 1.0, 2.0, 3.0, 10.0])
    assert found == {"median": 3.0, "q1": 2.0, "q3": 4.0, "mean": 4.0}
    assert isinstance(found["mean"], float)


def test_memory_is_that_of_a_process_with_one_model(models, tmp_path):
    cfg, model = models["solov2"]
    ballast = np.ones(400 * 2**20, np.uint8)  # of this process
    cfg = cfg.clone()
    cfg.MODEL.WEIGHTS = str(tmp_path / "model.pth")
    torch.save({"model": model.state_dict()}, cfg.MODEL.WEIGHTS)
    log = tmp_path / "log.txt"
    found = in_process(measure.measure_inference, cfg, 2, "float32", log=log)
    training = in_process(measure.training_memory, cfg, log=log)
    baseline = found["memory"]["baseline"]
    assert 0 < baseline < found["memory"]["inference"] < training
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    assert found["input_size"] == [64, 64] and found["flops"] > 0 and found["notes"] == []
    if os.path.exists("/proc/self/status"):
        assert training < ballast.nbytes + baseline


def fail(message):
    print("seen in the log")
    raise UserError(message)


def test_an_error_crosses_the_process_and_output_goes_to_the_log(tmp_path):
    log = tmp_path / "folder/log.txt"
    with pytest.raises(UserError, match="no such thing"):
        in_process(fail, "no such thing", log=log)
    assert log.read_text().splitlines()[-1] == "seen in the log"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_killed_comparison_leaves_no_process_behind(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    code = (
        "from pathlib import Path\n"
        "from solo_d2.tools.compare.process import in_process\n"
        f"in_process(Path.read_text, Path({str(pipe)!r}), log=Path({str(tmp_path)!r}) / 'log')\n"
    )
    with subprocess.Popen([sys.executable, "-c", code]) as comparison:
        try:
            writer = open_when_read(pipe, comparison)
        finally:
            comparison.kill()
    # as long as the reader lives, it reads
    try:
        deadline = time.monotonic() + 60
        with pytest.raises(BrokenPipeError):
            while time.monotonic() < deadline:
                os.write(writer, b"x")
                time.sleep(0.05)
    finally:
        os.close(writer)


def open_when_read(pipe, process):
    """For writing, as soon as another process opens it for reading."""
    while process.poll() is None:
        try:
            return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:  # nobody reads yet
            time.sleep(0.1)
    raise AssertionError("it ended before it read")
