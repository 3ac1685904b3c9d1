"""Time, memory, parameters and operations of models, measured so that they can be compared.

Latency is that of ``model(batch)``: from resized images in CPU memory to instances with masks at
the images' sizes. It consists of

- preprocess: to the device, normalize, pad,
- network: the forward passes of the backbone and of the heads' modules,
- nms: the rest of the inference, which chooses candidates, suppresses duplicates, makes masks,
- output: masks at the images' sizes.
"""

import itertools
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.engine import AMPTrainer, SimpleTrainer
from detectron2.modeling import GeneralizedRCNN
from detectron2.utils.events import EventStorage
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from solo_d2.checkpoint import build_checkpointer
from solo_d2.data import build_mapper, setup_datasets
from solo_d2.engine import Trainer, build_optimizer
from solo_d2.errors import one_line
from solo_d2.modeling import InstanceSegmentor
from solo_d2.modeling.prepare import precision
from solo_d2.tools.timing import StageClock, process_memory, wait

PARTS = ("preprocess", "network", "nms", "output")
_WARM_UP = 3
# For measures that hardly differ between images or iterations.
_FEW = 3

Inputs = list[dict[str, Any]]
Seconds = dict[str, float]


def load_model(cfg: CfgNode) -> nn.Module:
    """The model of a config, whose data sets are registered, with its weights, in eval mode."""
    model = Trainer.build_model(cfg)
    build_checkpointer(cfg, model, require_complete=True).load(cfg.MODEL.WEIGHTS)
    return model.eval()


def sample_inputs(cfg: CfgNode, count: int) -> Inputs:
    """``count`` images, spread evenly over the test set, as the model of ``cfg`` takes them."""
    records = DatasetCatalog.get(cfg.DATASETS.TEST[0])
    chosen = np.linspace(0, len(records) - 1, min(count, len(records))).round()
    mapper = build_mapper(cfg, is_train=False)
    return [mapper(records[int(i)]) for i in chosen]


def measure_inference(cfg: CfgNode, images: int, dtype: str) -> dict[str, Any]:
    """Most frequent input size (height, width), bytes of memory, parameters, operations, "notes".

    To be called in a process of its own, like ``training_memory`` and ``measure_times``.
    """
    setup_datasets(cfg)
    inputs = sample_inputs(cfg, images)
    device = torch.device(cfg.MODEL.DEVICE)
    memory = {"device": device.type, "baseline": _peak_memory(device)}
    model = load_model(cfg)
    with torch.no_grad(), precision(device.type, dtype):
        for x in inputs[:_FEW]:
            model([x])
    memory["inference"] = _peak_memory(device)
    sizes = Counter(tuple(x["image"].shape[-2:]) for x in inputs)
    found = {"input_size": [*sizes.most_common(1)[0][0]], "memory": memory, "notes": []}
    found["parameters"] = sum(x.numel() for x in model.parameters())
    try:
        return found | count_flops(model, inputs[:_FEW])
    except Exception as error:  # of a user's own model
        return found | {"notes": [f"operations not counted: {one_line(error)}"]}


def training_memory(cfg: CfgNode) -> int:
    """Bytes at the peak of a few training steps."""
    setup_datasets(cfg)
    step = training_step(cfg, load_model(cfg))
    for _ in range(_FEW):
        step()
    return _peak_memory(torch.device(cfg.MODEL.DEVICE))


def measure_times(
    cfgs: Mapping[str, CfgNode],
    train_cfgs: Mapping[str, CfgNode],
    batch_size: int,
    images: int,
    steps: int,
    dtype: str,
) -> dict[str, Any]:
    """By model, "latency" of batches of 1 and of ``batch_size``, training "steps", and "notes".

    ``dtype`` is that of inference, see ``precision``.
    """
    device = torch.device(next(iter(cfgs.values())).MODEL.DEVICE)
    notes: dict[str, list[str]] = {name: [] for name in cfgs}
    latency: dict[str, list[dict[str, Any]]] = {name: [] for name in cfgs}
    for cfg in (*cfgs.values(), *train_cfgs.values()):
        setup_datasets(cfg)
    models = {name: load_model(cfg) for name, cfg in cfgs.items()}
    inputs = {name: sample_inputs(cfg, images) for name, cfg in cfgs.items()}
    for size in sorted({1, batch_size}):
        batches = {name: make_batches(x, size) for name, x in inputs.items()}
        with precision(device.type, dtype):
            rows = time_inference(models, batches, notes)
        for name, row in rows.items():
            latency[name].append(row)
    models = {name: load_model(cfg) for name, cfg in train_cfgs.items()} if steps else {}
    found = time_training(models, train_cfgs, steps, notes)
    return {"latency": latency, "steps": found, "notes": notes}


def make_batches(inputs: Inputs, size: int) -> list[Inputs]:
    """All images in batches of one size, at least a few batches; images may come again."""
    count = max(_FEW, -(-len(inputs) // size)) if size > 1 else len(inputs)
    stream = itertools.cycle(inputs)
    return [list(itertools.islice(stream, size)) for _ in range(count)]


def count_flops(model: nn.Module, inputs: Inputs) -> dict[str, Any]:
    """Multiply-adds of an inference, counted as PyTorch dispatches the operators.

    Returns:
        Means over the images: "flops" of the modules (convolutions and linear layers of backbone
        and heads), "flops_post" of the rest (making and rescaling masks, NMS), and "detections",
        which the rest depends on.
    """
    deform_conv = torch.ops.torchvision.deform_conv2d
    totals: dict[str, list[float]] = {"flops": [], "flops_post": [], "detections": []}
    for x in inputs:
        counter = FlopCounterMode(display=False, custom_mapping={deform_conv: _deform_conv_flops})
        with torch.no_grad(), counter:
            (result,) = model([{key: x[key] for key in ("image", "height", "width")}])
        counts = {name: sum(ops.values()) / 2 for name, ops in counter.get_flop_counts().items()}
        total = counts.pop("Global", 0.0)
        below = {name: n for name, n in counts.items() if "." in name}  # below the model
        inside = {x for x in below for y in below if x.startswith(f"{y}.")}  # another one of them
        network = sum(n for name, n in below.items() if name not in inside)
        totals["flops"].append(network)
        totals["flops_post"].append(total - network)
        totals["detections"].append(len(result.get("instances", ())))
    return {name: float(np.mean(values)) for name, values in totals.items()}


def _deform_conv_flops(
    x: Any, weight: Any, *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    """As those of a convolution; the interpolation is not counted."""
    return int(2 * np.prod(out_shape) * np.prod(weight[1:]))


def time_inference(
    models: Mapping[str, nn.Module],
    batches: Mapping[str, Sequence[Inputs]],
    notes: Mapping[str, list[str]],
) -> dict[str, dict[str, Any]]:
    """Time models in turn on the same images, so that a slower minute favors none.

    Args:
        models: in eval mode.
        batches: per model, the same number for each.
        notes: gets a line about each model that fails, which is left out.

    Returns:
        Per model "batch", "images", and seconds per image: "total" and "parts" (of the models whose
        stages are known), each with "median", "q1", "q3" and "mean".
    """

    @torch.no_grad()
    def infer(name: str, number: int) -> Seconds:
        model, batch = models[name], batches[name][number]
        seconds = {"total": _seconds(model, lambda: model(batch))}
        seconds |= time_stages(model, batch) if _has_stages(model) else {}
        return {part: x / len(batch) for part, x in seconds.items()}

    rows = {}
    rounds = min(len(x) for x in batches.values())
    for name, found in _in_turn(list(models), rounds, infer, notes).items():
        parts = {part: quartiles([x[part] for x in found]) for part in found[0]}
        size, images = len(batches[name][0]), sum(map(len, batches[name]))
        rows[name] = {"batch": size, "images": images, "total": parts.pop("total"), "parts": parts}
    return rows


def time_stages(model: nn.Module, batch: Inputs) -> Seconds:
    """Seconds of each part of one inference, for a model that ``_has_stages``."""
    clock = StageClock(model, _device(model))
    clock.run(batch)
    return dict(zip(PARTS, clock.seconds.values()))


def _has_stages(model: nn.Module) -> bool:
    # a GeneralizedRCNN with an inference of its own, such as PanopticFPN, has more of them
    standard = getattr(type(model), "inference", None) is GeneralizedRCNN.inference
    return standard or isinstance(model, InstanceSegmentor)


def time_training(
    models: Mapping[str, nn.Module],
    cfgs: Mapping[str, CfgNode],
    steps: int,
    notes: Mapping[str, list[str]],
) -> dict[str, dict[str, Any]]:
    """Quartiles of the seconds per training step, without loading; see ``time_inference``."""
    step = {name: training_step(cfgs[name], model) for name, model in models.items()}
    samples = _in_turn(list(models), steps, lambda name, _: step[name](), notes)
    return {name: quartiles(found) for name, found in samples.items()}


def training_step(cfg: CfgNode, model: nn.Module) -> Callable[[], float]:
    """A function that makes one step at learning rate 0 on loaded batches; it gives its seconds."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.DATALOADER.NUM_WORKERS = 0
    batches = itertools.cycle(list(itertools.islice(Trainer.build_train_loader(cfg), _FEW)))
    optimizer = build_optimizer(cfg, model)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    amp = cfg.SOLVER.AMP.ENABLED and next(model.parameters()).is_cuda
    trainer = (AMPTrainer if amp else SimpleTrainer)(model, batches, optimizer)

    def step() -> float:
        with EventStorage(0):
            return _seconds(model, trainer.run_step)

    return step


def quartiles(values: Sequence[float]) -> dict[str, float]:
    q1, median, q3 = np.percentile(values, [25, 50, 75]).tolist()
    return {"median": median, "q1": q1, "q3": q3, "mean": float(np.mean(values))}


def _in_turn(
    names: Sequence[str],
    rounds: int,
    run: Callable[[str, int], Any],
    notes: Mapping[str, list[str]],
) -> dict[str, list[Any]]:
    """What ``rounds`` calls give for each name, after a warm-up; each round begins with another."""
    found: dict[str, list[Any]] = {name: [] for name in names}
    for number in range(_WARM_UP + rounds):
        first = number % max(1, len(names))
        for name in (*names[first:], *names[:first]):
            if name not in found:
                continue
            try:
                found[name].append(run(name, max(0, number - _WARM_UP)))
            except Exception as error:  # it runs out of memory, for example; the others go on
                notes[name].append(f"not timed: {one_line(error)}")
                del found[name]
    return {name: values[_WARM_UP:] for name, values in found.items()}


def _seconds(model: nn.Module, run: Callable[[], object]) -> float:
    wait(_device(model))
    start = time.perf_counter()
    run()
    wait(_device(model))
    return time.perf_counter() - start


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _peak_memory(device: torch.device) -> int:
    """Bytes of tensors on a GPU, or of the whole process, since the start of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "linux":  # getrusage would give the peak of the process it is a fork of
        return process_memory("VmHWM")
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS, in bytes
