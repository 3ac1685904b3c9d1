"""Time, memory, parameters and operations of models, measured so that they can be compared.

Latency is that of ``model(batch)``: from resized images in CPU memory to instances with masks at
the images' sizes. It consists of

- preprocess: to the device, normalize, pad,
- network: the forward passes of the backbone and of the heads' modules,
- nms: the rest of the inference, which chooses candidates, suppresses duplicates, makes masks,
- output: masks at the images' sizes.

The stages are the model's own public steps, called one after the other.
"""

import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.modeling import GeneralizedRCNN
from detectron2.utils.events import EventStorage
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from solo_d2.checkpoint import build_checkpointer
from solo_d2.data import InstanceMapper
from solo_d2.engine import Trainer, build_optimizer
from solo_d2.errors import one_line
from solo_d2.modeling import InstanceSegmentor

PARTS = ("preprocess", "network", "nms", "output")
_WARM_UP = 3
# For measures that hardly differ between images or iterations.
_FEW = 3

Inputs = list[dict[str, Any]]
Seconds = dict[str, float]


class ModelError(Exception):
    """A model fails where it is measured together with others."""

    def __init__(self, name: str, error: Exception):
        super().__init__(name, one_line(error))
        self.name = name

    def __str__(self) -> str:
        return self.args[1]


def load_model(cfg: CfgNode) -> nn.Module:
    """The model of a config, whose data sets are registered, with its weights, in eval mode."""
    model = Trainer.build_model(cfg)
    build_checkpointer(cfg, model, require_complete=True).load(cfg.MODEL.WEIGHTS)
    return model.eval()


def test_inputs(cfg: CfgNode, count: int) -> Inputs:
    """``count`` images, spread evenly over the test set, as the model of ``cfg`` takes them."""
    records = DatasetCatalog.get(cfg.DATASETS.TEST[0])
    chosen = np.linspace(0, len(records) - 1, min(count, len(records))).round()
    mapper = InstanceMapper(cfg, is_train=False)
    return [mapper(records[int(i)]) for i in chosen]


test_inputs.__test__ = False  # type: ignore[attr-defined]  # pytest would take it for a test


def make_batches(inputs: Inputs, size: int) -> list[Inputs]:
    """All images in batches of one size, at least a few batches; images may come again."""
    count = max(_FEW, -(-len(inputs) // size)) if size > 1 else len(inputs)
    stream = itertools.cycle(inputs)
    return [list(itertools.islice(stream, size)) for _ in range(count)]


def input_size(inputs: Inputs) -> list[int]:
    """The most frequent height and width."""
    sizes = Counter(tuple(x["image"].shape[-2:]) for x in inputs)
    return list(sizes.most_common(1)[0][0])


def count_parameters(model: nn.Module) -> dict[str, int]:
    parameters = list(model.parameters())
    return {
        "parameters": sum(x.numel() for x in parameters),
        "parameters_trainable": sum(x.numel() for x in parameters if x.requires_grad),
    }


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
        network = sum(n for name, n in counts.items() if _is_outermost(name, counts))
        totals["flops"].append(network)
        totals["flops_post"].append(total - network)
        totals["detections"].append(len(result["instances"]))
    return {name: float(np.mean(values)) for name, values in totals.items()}


def _is_outermost(name: str, counts: Mapping[str, float]) -> bool:
    """Whether a module is below the model, and in no other module that was counted."""
    parts = name.split(".")
    above = (".".join(parts[:i]) for i in range(2, len(parts)))
    return len(parts) > 1 and not any(prefix in counts for prefix in above)


def _deform_conv_flops(
    x: Any, weight: Any, *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    """As those of a convolution; the interpolation is not counted."""
    return int(2 * np.prod(out_shape) * np.prod(weight[1:]))


def time_inference(
    models: Mapping[str, nn.Module], batches: Mapping[str, Sequence[Inputs]]
) -> dict[str, dict[str, Any]]:
    """Time models in turn on the same images, so that a slower minute favors none.

    Args:
        models: in eval mode.
        batches: per model, the same number for each.

    Returns:
        Per model "batch", "images", and seconds per image: "total" and "parts" (of the models whose
        stages are known, see ``stages``), each with "median", "q1", "q3" and "mean".

    Raises:
        ModelError: a model fails.
    """
    totals: dict[str, list[float]] = {name: [] for name in models}
    parts: dict[str, list[Seconds]] = {name: [] for name in models}

    def infer(name: str, number: int) -> None:
        model, batch = models[name], batches[name][number]
        _synchronize(model)
        start = time.perf_counter()
        model(batch)
        _synchronize(model)
        totals[name].append((time.perf_counter() - start) / len(batch))
        if _has_stages(model):
            parts[name].append({k: x / len(batch) for k, x in time_stages(model, batch).items()})

    rounds = min(len(x) for x in batches.values())
    with torch.no_grad():
        _in_turn(list(models), rounds, infer)
    return {
        name: {
            "batch": len(batches[name][0]),
            "images": sum(len(x) for x in batches[name]),
            "total": quartiles(totals[name][_WARM_UP:]),
            "parts": {
                part: quartiles([x[part] for x in parts[name][_WARM_UP:]])
                for part in PARTS
                if parts[name]
            },
        }
        for name in models
    }


def time_stages(model: nn.Module, batch: Inputs) -> Seconds:
    """Seconds of each part of one inference, for a model that ``_has_stages``."""
    seconds = dict.fromkeys(PARTS, 0.0)
    with _watched_modules(model) as in_modules:
        _synchronize(model)
        start = time.perf_counter()
        for part in stages(model, batch):
            _synchronize(model)
            now = time.perf_counter()
            # what modules computed in this stage is network time
            seconds["network"] += in_modules[0]
            seconds[part] += now - start - in_modules[0]
            in_modules[0] = 0.0
            start = time.perf_counter()
    return seconds


def stages(model: nn.Module, batch: Inputs) -> Iterator[str]:
    """Run an inference step by step; gives the name of each part when it has ended."""
    images = model.preprocess_image(batch)
    yield "preprocess"
    features = model.backbone(images.tensor)
    yield "network"
    if isinstance(model, InstanceSegmentor):
        results = model.inference(images, features)
        yield "nms"
        model.postprocess_batch(results, batch, images)
    else:
        proposals, _ = model.proposal_generator(images, features, None)
        results, _ = model.roi_heads(images, features, proposals, None)
        yield "nms"
        GeneralizedRCNN._postprocess(results, batch, images.image_sizes)
    yield "output"


def _has_stages(model: nn.Module) -> bool:
    rcnn = isinstance(model, GeneralizedRCNN) and model.proposal_generator is not None
    return rcnn or isinstance(model, InstanceSegmentor)


@contextmanager
def _watched_modules(model: nn.Module) -> Iterator[list[float]]:
    """Within it, a sum of the seconds that the heads' modules are at work."""
    total, depth, started = [0.0], [0], [0.0]

    def enter(*_: Any) -> None:
        if depth[0] == 0:
            _synchronize(model)
            started[0] = time.perf_counter()
        depth[0] += 1

    def leave(*_: Any) -> None:
        depth[0] -= 1
        if depth[0] == 0:
            _synchronize(model)
            total[0] += time.perf_counter() - started[0]

    handles = []
    for module in _head_modules(model):
        handles.append(module.register_forward_pre_hook(enter))
        handles.append(module.register_forward_hook(leave))
    try:
        yield total
    finally:
        for handle in handles:
            handle.remove()


def _head_modules(model: nn.Module) -> list[nn.Module]:
    """The modules beside the backbone that only compute; an R-CNN's two stages are containers."""
    modules: list[nn.Module] = []
    for name, child in model.named_children():
        if name == "backbone":
            continue
        if name in ("proposal_generator", "roi_heads"):
            modules += [x for x in child.modules() if x is not child]
        else:
            modules += child.modules()  # a head may be entered by another method than forward
    return list(dict.fromkeys(modules))


def time_training(
    models: Mapping[str, nn.Module], *, cfgs: Mapping[str, CfgNode], steps: int
) -> dict[str, dict[str, Any]]:
    """Time training steps of models in turn, without changing their parameters.

    Returns:
        Per model seconds per step ("median", "q1", "q3", "mean") and the images per step,
        "batch". Loading is not part of it.

    Raises:
        ModelError: a model fails.
    """
    step = {name: training_step(cfgs[name], models[name]) for name in models}
    samples: dict[str, list[float]] = {name: [] for name in models}
    _in_turn(list(models), steps, lambda name, _: samples[name].append(step[name]()))
    return {
        name: {**quartiles(samples[name][_WARM_UP:]), "batch": cfgs[name].SOLVER.IMS_PER_BATCH}
        for name in models
    }


def training_step(cfg: CfgNode, model: nn.Module) -> Callable[[], float]:
    """A function that makes one step at learning rate 0 on loaded batches; it gives its seconds."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.DATALOADER.NUM_WORKERS = 0
    batches = itertools.cycle(list(itertools.islice(Trainer.build_train_loader(cfg), _FEW)))
    optimizer = build_optimizer(cfg, model)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    device = next(model.parameters()).device
    amp = cfg.SOLVER.AMP.ENABLED and device.type == "cuda"
    scaler = torch.amp.GradScaler(device.type, enabled=amp)
    model.train()

    def step() -> float:
        batch = next(batches)
        _synchronize(model)
        start = time.perf_counter()
        with EventStorage(0), torch.autocast(device.type, enabled=amp):
            loss = sum(model(batch).values())
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        _synchronize(model)
        return time.perf_counter() - start

    return step


def inference_memory(cfg: CfgNode) -> tuple[int, int]:
    """Bytes before there is a model, and at the peak; to be called in a process of its own."""
    inputs = test_inputs(cfg, _FEW)
    device = torch.device(cfg.MODEL.DEVICE)
    baseline = _peak_memory(device)
    model = load_model(cfg)
    with torch.no_grad():
        for x in inputs:
            model([x])
    return baseline, _peak_memory(device)


def training_memory(cfg: CfgNode) -> int:
    """Bytes at the peak of a few steps; to be called in a process of its own."""
    step = training_step(cfg, load_model(cfg))
    for _ in range(_FEW):
        step()
    return _peak_memory(torch.device(cfg.MODEL.DEVICE))


def quartiles(values: Sequence[float]) -> dict[str, float]:
    q1, median, q3 = np.percentile(values, [25, 50, 75]).tolist()
    return {"median": median, "q1": q1, "q3": q3, "mean": float(np.mean(values))}


def iteration_time(metrics: Sequence[Mapping[str, Any]]) -> dict[str, float] | None:
    """Quartiles of the seconds per iteration that lines of metrics.json have."""
    times = [x["time"] for x in metrics if "time" in x]
    return quartiles(times) if times else None


def without_failing(
    models: Mapping[str, nn.Module],
    measure: Callable[[Mapping[str, nn.Module]], dict[str, Any]],
    what: str,
    errors: list[str],
) -> dict[str, Any]:
    """Measure all models, again without the one that fails, for lack of memory for example."""
    chosen = dict(models)
    while chosen:
        try:
            return measure(chosen)
        except ModelError as error:
            errors.append(f"{error.name}: no {what}: {error}")
            del chosen[error.name]
    return {}


def _in_turn(names: Sequence[str], rounds: int, run: Callable[[str, int], None]) -> None:
    """``_WARM_UP`` rounds and then ``rounds``, each beginning with another name."""
    for number in range(_WARM_UP + rounds):
        first = number % len(names)
        for name in (*names[first:], *names[:first]):
            try:
                run(name, max(0, number - _WARM_UP))
            except Exception as error:
                raise ModelError(name, error) from error


def _synchronize(model: nn.Module) -> None:
    device = next(model.parameters()).device
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak_memory(device: torch.device) -> int:
    """Bytes of tensors on a GPU, or of the whole process, since the start of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        with open("/proc/self/status") as status:
            # getrusage would give the peak of the process that this one was forked from
            peak = next(line for line in status if line.startswith("VmHWM"))
            return int(peak.split()[1]) * 1024
    except (OSError, StopIteration):  # no Linux
        import resource
        import sys

        usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return usage if sys.platform == "darwin" else usage * 1024
