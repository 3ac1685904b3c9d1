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
from torch.nn import functional as F

from solo_d2.config import load_config
from solo_d2.data import setup_datasets
from solo_d2.layers.deform_conv import DeformConv2d
from solo_d2.tools.compare import measure

PAUSE = 0.004
CPU = torch.device("cpu")


class Head(nn.Module):
    """Has a second way in, as SOLO's and AdaptIS's heads have."""

    def __init__(self):
        super().__init__()
        self.conv = Pause()

    def forward(self, x):
        return self.conv(x)

    def select(self, x):
        return self.conv(x)


class Pause(nn.Module):
    def forward(self, x):
        time.sleep(PAUSE)
        return x


class Toy(nn.Module):
    """Each part takes a number of pauses of its own."""

    def __init__(self):
        super().__init__()
        self.backbone, self.head = Pause(), Head()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, batch):
        x = self.preprocess_image(batch)  # 1
        x = self.head(self.backbone(x))  # network: 2
        time.sleep(3 * PAUSE)
        x = self.head.select(x)  # network: 1
        time.sleep(PAUSE)
        return [self.postprocess(x) for _ in batch]  # 2 for each image

    def preprocess_image(self, batch):
        time.sleep(PAUSE)
        return batch

    def postprocess(self, x):
        time.sleep(2 * PAUSE)
        return x


def test_every_moment_belongs_to_one_part():
    model, watch = Toy(), measure.Stopwatch(CPU)
    with measure.watched(model, watch):
        start = time.perf_counter()
        watch.start()
        model([0, 1])
        seconds = watch.stop()
        whole = time.perf_counter() - start
    assert 0 <= whole - sum(seconds.values()) < 0.1 * whole
    pauses = {part: x / PAUSE for part, x in seconds.items()}
    at_least = {"preprocess": 1, "network": 3, "nms": 4, "output": 4}
    assert all(pauses[part] >= n for part, n in at_least.items()), pauses
    # the model is as it was
    assert not any(name in vars(model) for name in ("preprocess_image", "postprocess"))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


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


@pytest.mark.parametrize("name", ["solov2", "mask_rcnn"])
def test_the_parts_of_a_real_model_follow_each_other(models, name):
    cfg, model = models[name]

    class Listening(measure.Stopwatch):
        def _mark(self):
            if not self.parts or self.parts[-1] != self._stack[-1]:
                self.parts.append(self._stack[-1])
            super()._mark()

    watch = Listening(CPU)
    watch.parts = []
    with torch.no_grad(), measure.watched(model, watch):
        watch.start()
        model(measure.test_inputs(cfg, 1))
        seconds = watch.stop()
    order = [part for part in watch.parts if part != "nms"]
    order = [part for i, part in enumerate(order) if i == 0 or part != order[i - 1]]
    assert order == ["preprocess", "network", "output"]
    assert all(x > 0 for x in seconds.values())
    assert seconds["network"] > seconds["output"]
    if isinstance(model, GeneralizedRCNN):
        # between the two stages boxes are decoded and suppressed
        assert watch.parts.count("network") >= 3


def test_models_take_turns_and_each_begins_a_round():
    calls = []
    measure._in_turn(["a", "b", "c"], 2, lambda name, number: calls.append((name, number)))
    rounds = [calls[i : i + 3] for i in range(0, len(calls), 3)]
    assert len(rounds) == measure._WARM_UP + 2
    assert all({name for name, _ in x} == {"a", "b", "c"} for x in rounds)
    assert [x[0][0] for x in rounds[:4]] == ["a", "b", "c", "a"]
    assert [{n for _, n in x} for x in rounds] == [{0}] * measure._WARM_UP + [{0}, {1}]


def test_a_model_that_fails_is_named():
    def run(name, number):
        if name == "b":
            raise RuntimeError("out of\nmemory")

    with pytest.raises(measure.ModelError, match="out of memory") as error:
        measure._in_turn(["a", "b"], 1, run)
    assert error.value.name == "b"


def test_latencies_are_per_image_and_their_parts_add_up(models):
    batches = {
        n: measure.make_batches(measure.test_inputs(c, 3), 2) for n, (c, _) in models.items()
    }
    rows = measure.time_inference({name: model for name, (_, model) in models.items()}, batches)
    assert rows.keys() == models.keys()
    for row in rows.values():
        assert (row["batch"], row["images"]) == (2, 6)
        assert tuple(row["parts"]) == measure.PARTS
        parts = sum(part["mean"] for part in row["parts"].values())
        assert parts == pytest.approx(row["total"]["mean"])
        assert 0 < row["total"]["q1"] <= row["total"]["median"] <= row["total"]["q3"]
    json.dumps(rows, allow_nan=False)


def test_batches_have_one_size_and_images_may_come_again():
    assert measure.make_batches(list("abc"), 1) == [["a"], ["b"], ["c"]]
    assert measure.make_batches(list("abc"), 2) == [["a", "b"], ["c", "a"], ["b", "c"]]
    assert [len(x) for x in measure.make_batches(list("abcdefghi"), 2)] == [2] * 5


def test_the_inputs_are_spread_over_the_test_set_and_resized_as_the_config_says(models):
    cfg = models["solov2"][0].clone()
    cfg.INPUT.MIN_SIZE_TEST = 32
    inputs = measure.test_inputs(cfg, 2)
    assert [x["image_id"] for x in inputs] == [1, 3]
    assert measure.input_size(inputs) == [32, 32]
    assert inputs[0]["height"] == 64


def test_training_steps_are_timed_without_changing_parameters(models):
    before = {name: [p.clone() for p in model.parameters()] for name, (_, model) in models.items()}
    rows = measure.time_training(
        {name: model for name, (_, model) in models.items()},
        cfgs={name: cfg for name, (cfg, _) in models.items()},
        steps=2,
    )
    for name, (_, model) in models.items():
        assert rows[name]["batch"] == 2 and rows[name]["median"] > 0
        assert all(torch.equal(a, b) for a, b in zip(before[name], model.parameters()))
        assert any(p.grad is not None for p in model.parameters())
        model.eval()


class Countable(nn.Module):
    """A conv, a deformable one, and what PyTorch's tracer fails at."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.deform = DeformConv2d(4, 6, kernel_size=3, padding=1, bias=False)

    def forward(self, batch):
        x = self.deform(self.conv(batch[0]["image"][None]))
        result = Instances((8, 8))
        result.pred_masks = F.interpolate(x, scale_factor=2)[0] > 0
        result.scores = result.pred_masks.view(torch.uint8).flatten(1).amax(dim=1).float()
        return [{"instances": result}]


def test_flops_are_multiplications_and_what_is_not_counted_is_named():
    model = Countable()
    inputs = [{"image": torch.rand(3, 4, 5), "height": 4, "width": 5}] * 2
    found = measure.count_flops(model, inputs)
    offsets = sum(m.weight.numel() * 20 for m in model.deform.modules() if isinstance(m, nn.Conv2d))
    offsets = offsets or sum(p.numel() for n, p in model.deform.named_parameters() if "offset" in n)
    plain = 4 * 3 * 9 * 20 + 6 * 4 * 9 * 20
    assert found["flops"] >= plain
    assert found["flops"] == found["flops"] // 20 * 20
    assert found["flops_images"] == 2 and found["flops_std"] == 0
    assert "aten::amax" in found["flops_unsupported"]
    assert "torchvision::deform_conv2d" not in found["flops_unsupported"]
    assert not any("profiler" in name for name in found["flops_unsupported"])
    # the tracer's crutch is gone
    assert "view" not in vars(torch.Tensor)


def test_flops_of_a_padded_image_are_counted(tiny_configs, tmp_path):
    """While a graph is traced, sizes of images are tensors."""
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


def test_parameters_are_counted():
    model = nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    assert measure.count_parameters(model) == {"parameters": 8, "parameters_trainable": 6}


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
    memory = measure.measure_memory(cfg, cfg)
    assert memory["device"] == "cpu" and memory["training_batch"] == 2
    assert 0 < memory["baseline"] < memory["inference"] < memory["training"]
    if os.path.exists("/proc/self/status"):
        assert memory["training"] < ballast.nbytes + memory["baseline"]
        assert memory["training"] < measure._peak(CPU)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_killed_comparison_leaves_no_process_behind(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    code = (
        "from pathlib import Path\n"
        "from solo_d2.tools.compare import measure\n"
        f"measure._in_new_process(Path.read_text, Path({str(pipe)!r}))\n"
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
