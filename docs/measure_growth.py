"""The table "Growth" of docs/performance.md: SOLOv2 R50 on the CPU.

    OMP_NUM_THREADS=2 python docs/measure_growth.py

A line for each row: what grows, its value, median seconds, and MiB beyond those of the model.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from measure_performance import LARGE, SOLO, random_input, spread_heads
from torch import nn

from solo_d2.config import load_config
from solo_d2.modeling.prepare import prepare_for_inference
from solo_d2.tools.timing import peak_memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", type=float, default=1.0, help="of the images' sides, for a test")
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    height, width = (round(side * options.scale) for side in LARGE)
    for kept in (1, 10, 100, 500):
        model, inputs = prepare_for_inference(build(kept)), random_input(height, width, 0)
        report("kept", kept, lambda m=model, x=inputs: infer(m, x), options.repeat)
    model = prepare_for_inference(build(100))
    for side in (400, 800, 1600, 3200):
        side = round(side * options.scale)
        inputs = random_input(side, round(side * 5 / 3), 0)
        report("side", side, lambda x=inputs: infer(model, x), options.repeat)
    model = build(100).train()
    for objects in (1, 20, 200, 1000):
        inputs = random_input(height, width, objects)
        report("objects", objects, lambda x=inputs: step(model, x), options.repeat)


def build(kept: int) -> nn.Module:
    opts = ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", *SOLO, "TEST.DETECTIONS_PER_IMAGE", kept]
    cfg = load_config("SOLOv2/SOLOv2_R50_1x.yaml", opts=opts)
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ()
    torch.manual_seed(0)
    model = build_model(cfg)
    spread_heads(model)
    return model


def report(what: str, value: int, run: Callable[[], None], repeat: int) -> None:
    run()  # warm-up
    seconds, memory = [], []
    for _ in range(repeat):
        with peak_memory(torch.device("cpu"), memory):
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
    print(
        f"{what} {value}: {statistics.median(seconds):.3g} s, {max(memory) / 2**20:.0f} MiB",
        flush=True,
    )


@torch.no_grad()
def infer(model: nn.Module, inputs: dict) -> None:
    model([inputs])


def step(model: nn.Module, inputs: dict) -> None:
    model.zero_grad()
    with EventStorage():
        losses = model([inputs])
    sum(losses.values()).backward()


if __name__ == "__main__":
    main()
