"""Profiling a model: ``solo-d2 benchmark --help``."""

import argparse
import resource
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Instances
from detectron2.utils.events import EventStorage
from PIL import Image
from torch import nn
from torch.profiler import ProfilerActivity, profile

from solo_d2.arguments import add_model_arguments, parse, print_error
from solo_d2.checkpoint.checkpointer import Checkpointer
from solo_d2.config import load_config, use_available_device
from solo_d2.images import as_rgb
from solo_d2.modeling.own_keys import all_keys_honored
from solo_d2.modeling.prepare import prepare

_PRODUCTS = ("convolution", "conv2d", "::mm", "::bmm", "::addmm", "::baddbmm", "gemm")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code: 0, or 2 after an error of one line."""
    options = parse(_parser(), arguments)
    try:
        cfg = load_config(options.config_file, opts=options.opts)
        use_available_device(cfg)
        model = _build(cfg, options.weights, options.allow_pickle)
        height, width = options.size
        inputs = random_input(height, width, options.instances, _num_classes(model))
        image = _read(options.image, options.size, cfg.INPUT.FORMAT) if options.image else None
    except Exception as error:
        print_error(error, options)
        return 2
    print(f"{options.config_file}, {options.size[0]} x {options.size[1]}, {cfg.MODEL.DEVICE}")
    benchmark(model, inputs, image, only=options.only, rows=options.rows)
    return 0


def benchmark(
    model: nn.Module,
    inputs: dict[str, Any],
    image: torch.Tensor | None = None,
    *,
    only: str | None = None,
    rows: int = 8,
) -> None:
    """Profile a training step and an inference, and print where their time goes.

    Args:
        model: a model with Detectron2's interface.
        inputs: input of the training step, with "instances".
        image: input of the inference; by default that of the training step.
        only: "training" or "inference"; None: both.
        rows: number of operators to list.
    """
    device = next(model.parameters()).device
    test_inputs = inputs if image is None else {**inputs, "image": image}

    def step() -> dict[str, float]:
        model.zero_grad()
        with EventStorage():  # Detectron2's own models write to it
            losses = model([inputs])
        sum(losses.values()).backward()
        return {name: loss.item() for name, loss in losses.items()}

    @torch.no_grad()
    def infer() -> Any:
        return model([test_inputs])[0]["instances"]

    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    start = f"peak memory with the model built: {_peak_memory(device)}"
    if only != "inference":
        model.train()
        losses = ", ".join(f"{name} {value:.6f}" for name, value in step().items())
        instances = len(inputs["instances"])
        _profile(f"training step, {instances} instances, {losses}", step, device, rows)
        model.zero_grad()
    if only != "training":
        model.eval()
        found = infer()
        what = f"{len(found)} instances found, sum of scores {found.scores.sum():.6f}"
        _profile(f"inference, {what}", infer, device, rows)
    print(f"\n{start}\npeak memory: {_peak_memory(device)}")


def random_input(height: int, width: int, instances: int, num_classes: int) -> dict[str, Any]:
    """A noise image with square instances, 16 pixels to half of the shorter side wide."""
    generator = torch.Generator().manual_seed(0)
    low, high = torch.tensor([16.0, max(17.0, min(height, width) / 2)]).log().tolist()
    sizes = (low + (high - low) * torch.rand(instances, generator=generator)).exp().long()
    masks = torch.zeros(instances, height, width, dtype=torch.bool)
    for mask, size in zip(masks, sizes.tolist()):
        y = int(torch.randint(0, height - size, (), generator=generator))
        x = int(torch.randint(0, width - size, (), generator=generator))
        mask[y : y + size, x : x + size] = True
    target = Instances((height, width))
    target.gt_masks = BitMasks(masks)
    target.gt_boxes = target.gt_masks.get_bounding_boxes()
    target.gt_classes = torch.randint(0, num_classes, (instances,), generator=generator)
    image = torch.rand(3, height, width, generator=generator) * 255
    return {"image": image, "height": height, "width": width, "instances": target}


def _profile(name: str, run: Callable[[], object], device: torch.device, rows: int) -> None:
    """Run once to warm up, once timed and once under the profiler, and print the results."""
    cuda = device.type == "cuda"

    def timed() -> float:
        start = time.perf_counter()
        run()
        if cuda:
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    timed()
    seconds = timed()
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiler:
        timed()
    events = profiler.key_averages()

    def own_time(event: Any) -> float:
        return event.self_device_time_total if cuda else event.self_cpu_time_total

    total = sum(own_time(event) for event in events)
    products = sum(own_time(e) for e in events if any(p in e.key for p in _PRODUCTS))
    print(f"\n{name}: {seconds:.3f} s, of which, according to the profiler,")
    print(f"  {products / total:6.1%} convolutions and matrix products")
    for event in events:
        if event.key.startswith("solo_d2."):
            inside = event.device_time_total if cuda else event.cpu_time_total
            print(f"  {inside / total:6.1%} {event.key}")
    for event in sorted(events, key=own_time, reverse=True)[:rows]:
        print(f"  {own_time(event) / total:6.1%} {own_time(event) / 1e3:9.1f} ms  {event.key}")


def _build(cfg: CfgNode, weights: str, allow_pickle: bool) -> nn.Module:
    torch.manual_seed(0)
    with all_keys_honored():
        model = prepare(build_model(cfg))
    if weights:
        Checkpointer(model, require_complete=True, allow_pickle=allow_pickle).load(weights)
    return model


def _num_classes(model: nn.Module) -> int:
    model = getattr(model, "roi_heads", model)  # of Detectron2's GeneralizedRCNN
    return getattr(model, "num_classes", None) or model.num_things


def _read(path: str, size: Sequence[int], input_format: str) -> torch.Tensor:
    """(3, H, W) float32."""
    image = Image.fromarray(as_rgb(path)).resize((size[1], size[0]))
    pixels = np.asarray(image)[:, :, :: -1 if input_format == "BGR" else 1]
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))).float()


def _peak_memory(device: torch.device) -> str:
    """Peak memory of the process, or of the tensors on a GPU."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 1024**3:.2f} GiB on the GPU"
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2:.2f} GiB"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="solo-d2 benchmark",
        usage="%(prog)s --config-file YAML [options] [KEY VALUE ...]",
        description="Profile a training step and an inference: the share of convolutions and "
        "matrix products, of target assignment, and the slowest operators.",
    )
    add_model_arguments(parser, weights_help="default: random")
    parser.add_argument("--image", default="", help="for inference, instead of noise")
    parser.add_argument("--size", type=int, nargs=2, default=(800, 1333), metavar=("H", "W"))
    parser.add_argument("--instances", type=int, default=50, help="in the training image")
    parser.add_argument("--only", choices=["training", "inference"], help="default: both")
    parser.add_argument("--rows", type=int, default=8, help="number of operators to list")
    return parser
