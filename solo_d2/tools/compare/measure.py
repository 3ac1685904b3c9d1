"""Time, memory, parameters and operations of models, measured so that they can be compared.

Latency is that of ``model(batch)``: from images in the memory of the CPU, already resized, to
instances with masks of the images' sizes on the model's device. It is split into

- preprocess: to the device, normalize, pad,
- network: the modules that hold the weights,
- nms: all else of the inference: choosing candidates, NMS, assembly of masks,
- output: masks of the images' sizes.

The parts follow from where the model's own modules and methods begin and end, so that they add up
to the whole. On a GPU the borders are events in its queue: it is not stopped for them.
"""

import itertools
import logging
import multiprocessing
import os
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.engine import AMPTrainer, SimpleTrainer
from detectron2.modeling import GeneralizedRCNN
from detectron2.utils.analysis import FlopCountAnalysis
from detectron2.utils.events import EventStorage
from fvcore.nn.jit_handles import get_shape
from torch import nn

from solo_d2.checkpoint import build_checkpointer
from solo_d2.data import setup_datasets
from solo_d2.data.mapper import InstanceMapper
from solo_d2.engine import Trainer
from solo_d2.errors import one_line

PARTS = ("preprocess", "network", "nms", "output")
_WARM_UP = 3
# For measures that hardly differ between images or iterations.
_FEW = 3

Inputs = list[dict[str, Any]]
Seconds = dict[str, float]


class ModelError(Exception):
    """A model fails where it is measured together with others."""

    def __init__(self, name: str, error: Exception):
        super().__init__(one_line(error))
        self.name = name


class Stopwatch:
    """Says in which part each moment belongs to, from ``start`` to ``stop``."""

    def __init__(self, device: torch.device):
        self._device = device
        self._marks: list[tuple[str, Any]] = []
        self._stack: list[str] = []

    def start(self) -> None:
        self._synchronize()
        self._marks, self._stack = [], ["nms"]
        self._mark()

    def stop(self) -> Seconds:
        """Seconds per part."""
        self._mark()
        self._synchronize()
        seconds = dict.fromkeys(PARTS, 0.0)
        for (part, begin), (_, end) in zip(self._marks, self._marks[1:]):
            seconds[part] += begin.elapsed_time(end) / 1e3 if self._cuda else end - begin
        return seconds

    def enter(self, part: str) -> None:
        """Nested in another part, which goes on after ``leave``."""
        self._stack.append(part)
        if part != self._stack[-2]:
            self._mark()

    def leave(self) -> None:
        part = self._stack.pop()
        if part != self._stack[-1]:
            self._mark()

    def change(self, part: str) -> None:
        """From here on this part in place of the present one."""
        self._stack[-1] = part
        self._mark()

    @property
    def _cuda(self) -> bool:
        return self._device.type == "cuda"

    def _mark(self) -> None:
        moment: Any = time.perf_counter()
        if self._cuda:
            moment = torch.cuda.Event(enable_timing=True)
            moment.record()
        self._marks.append((self._stack[-1], moment))

    def _synchronize(self) -> None:
        if self._cuda:
            torch.cuda.synchronize(self._device)


@contextmanager
def watched(model: nn.Module, watch: Stopwatch) -> Iterator[None]:
    """Within it, the model tells the stopwatch which part begins."""
    handles, wrapped = [], []

    def wrap(name: str, part: str) -> None:
        method = getattr(model, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            watch.enter(part)
            result = method(*args, **kwargs)
            watch.leave()
            return result

        setattr(model, name, timed)
        wrapped.append(name)

    for module in _networks(model):
        handles.append(module.register_forward_pre_hook(lambda *_: watch.enter("network")))
        handles.append(module.register_forward_hook(lambda *_: watch.leave()))
    for name, part in (("preprocess_image", "preprocess"), ("postprocess", "output")):
        if hasattr(model, name):
            wrap(name, part)
    if isinstance(model, GeneralizedRCNN):
        # its post-processing is a static method; it comes after the heads
        handles.append(model.roi_heads.register_forward_hook(lambda *_: watch.change("output")))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for name in wrapped:
            delattr(model, name)


def _networks(model: nn.Module) -> list[nn.Module]:
    """The modules that do nothing but compute.

    Those of an R-CNN's two stages are containers. A head may be entered by another method than its
    ``forward``, so that its layers are listed too, but not those of the backbone: there are many.
    """
    modules: list[nn.Module] = []
    for name, child in model.named_children():
        if name == "backbone":
            modules.append(child)
        elif isinstance(model, GeneralizedRCNN) and name in ("proposal_generator", "roi_heads"):
            modules += [x for x in child.modules() if x is not child]
        else:
            modules += child.modules()
    return list(dict.fromkeys(modules))


def load_model(cfg: CfgNode) -> nn.Module:
    """The model of a config, whose data sets are registered, with its weights, in eval mode."""
    model = Trainer.build_model(cfg)
    build_checkpointer(cfg, model).load(cfg.MODEL.WEIGHTS)
    return model.eval()


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def test_inputs(cfg: CfgNode, count: int) -> Inputs:
    """``count`` images, spread evenly over the test set, as the model of ``cfg`` takes them."""
    records = DatasetCatalog.get(cfg.DATASETS.TEST[0])
    chosen = np.linspace(0, len(records) - 1, min(count, len(records))).round()
    mapper = InstanceMapper(cfg, is_train=False)
    return [mapper(records[int(i)]) for i in chosen]


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
    """Of an inference, by fvcore, which counts a multiplication with its addition as one.

    Returns:
        "flops" (mean over the images), "flops_std" between images, "flops_images",
        "flops_unsupported": operators that were not counted, with their numbers.
    """
    totals, unsupported = [], Counter[str]()
    model.eval()
    for x in inputs:
        needed = {key: x[key] for key in ("image", "height", "width")}
        with torch.no_grad(), _reinterpretable(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of tracing
            analysis = FlopCountAnalysis(model, [needed])
            analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
            analysis.tracer_warnings("none").set_op_handle(
                "torchvision::deform_conv2d", _deform_conv_flops
            )
            totals.append(float(analysis.total()))
            found = analysis.unsupported_ops()
        # labels for the profiler are no operators
        unsupported |= Counter({k: n for k, n in found.items() if not k.startswith("profiler::")})
    return {
        "flops": float(np.mean(totals)),
        "flops_std": float(np.std(totals)),
        "flops_images": len(totals),
        "flops_unsupported": dict(unsupported.most_common()),
    }


@contextmanager
def _reinterpretable() -> Iterator[None]:
    """Hide ``Tensor.view(dtype)`` from PyTorch's tracer, which fvcore uses and which fails at it.

    What comes of it is a constant to the tracer; no operation that counts is made of such bytes.
    """
    view = torch.Tensor.view

    def traceable(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        state = torch._C._get_tracing_state()
        if state is None or not (args and isinstance(args[0], torch.dtype)):
            return view(self, *args, **kwargs)
        torch._C._set_tracing_state(None)
        try:
            return view(self, *args, **kwargs)
        finally:
            torch._C._set_tracing_state(state)

    torch.Tensor.view = traceable
    try:
        yield
    finally:
        del torch.Tensor.view


def _deform_conv_flops(inputs: list[Any], outputs: list[Any]) -> int:
    """As those of a convolution; the interpolation is not counted."""
    weight, output = get_shape(inputs[1]), get_shape(outputs[0])
    return int(np.prod(output) * np.prod(weight[1:]))


def time_inference(
    models: Mapping[str, nn.Module], batches: Mapping[str, Sequence[Inputs]]
) -> dict[str, dict[str, Any]]:
    """Time models in turn on the same images.

    In each round every model gets one batch; another one begins each time. So a machine that
    becomes slower or is disturbed favors none.

    Args:
        models: in eval mode.
        batches: per model, as many for each.

    Returns:
        Per model "batch", "images", and seconds per image: "total" and "parts", each with
        "median", "q1", "q3" and "mean".

    Raises:
        ModelError: a model fails.
    """
    watches = {name: Stopwatch(device_of(model)) for name, model in models.items()}
    samples: dict[str, list[Seconds]] = {name: [] for name in models}

    def infer(name: str, number: int) -> None:
        model, watch = models[name], watches[name]
        batch = batches[name][number]
        with watched(model, watch):
            watch.start()
            model(batch)
            seconds = watch.stop()
        samples[name].append({part: x / len(batch) for part, x in seconds.items()})

    rounds = min(len(x) for x in batches.values())
    with torch.no_grad():
        _in_turn(list(models), rounds, infer)
    return {
        name: {
            "batch": len(batches[name][0]),
            "images": sum(len(x) for x in batches[name]),
            "total": quartiles([sum(x.values()) for x in samples[name][_WARM_UP:]]),
            "parts": {
                part: quartiles([x[part] for x in samples[name][_WARM_UP:]]) for part in PARTS
            },
        }
        for name in models
    }


def make_batches(inputs: Inputs, size: int) -> list[Inputs]:
    """All images in batches of one size, at least a few batches; images may come again."""
    count = max(_FEW, -(-len(inputs) // size)) if size > 1 else len(inputs)
    stream = itertools.cycle(inputs)
    return [list(itertools.islice(stream, size)) for _ in range(count)]


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
    trainers = {name: _StillTrainer(cfgs[name], models[name]) for name in models}
    samples: dict[str, list[float]] = {name: [] for name in models}
    _in_turn(list(models), steps, lambda name, _: samples[name].append(trainers[name].time_step()))
    return {
        name: {**quartiles(samples[name][_WARM_UP:]), "batch": cfgs[name].SOLVER.IMS_PER_BATCH}
        for name in models
    }


class _StillTrainer:
    """Steps of a training whose learning rate is 0, on batches that are loaded beforehand."""

    def __init__(self, cfg: CfgNode, model: nn.Module):
        cfg = cfg.clone()
        cfg.defrost()
        cfg.DATALOADER.NUM_WORKERS = 0
        batches = itertools.islice(Trainer.build_train_loader(cfg), _FEW)
        optimizer = Trainer.build_optimizer(cfg, model)
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        self._watch = Stopwatch(device_of(model))
        amp = cfg.SOLVER.AMP.ENABLED and device_of(model).type == "cuda"
        trainer_class = AMPTrainer if amp else SimpleTrainer
        self._trainer = trainer_class(model.train(), _Again(list(batches)), optimizer)

    def time_step(self) -> float:
        with EventStorage(0):
            self._trainer.iter = 0
            self._watch.start()
            self._trainer.run_step()
            return sum(self._watch.stop().values())


class _Again:
    """An endless iterable."""

    def __init__(self, items: Sequence[Any]):
        self._items = items

    def __iter__(self) -> Iterator[Any]:
        return itertools.cycle(self._items)


def _in_turn(names: Sequence[str], rounds: int, run: Callable[[str, int], None]) -> None:
    """``_WARM_UP`` rounds and then ``rounds``, each beginning with another name."""
    for number in range(_WARM_UP + rounds):
        first = number % len(names)
        for name in (*names[first:], *names[:first]):
            try:
                run(name, max(0, number - _WARM_UP))
            except Exception as error:
                raise ModelError(name, error) from error


def quartiles(values: Sequence[float]) -> dict[str, float]:
    q1, median, q3 = np.percentile(values, [25, 50, 75]).tolist()
    return {"median": median, "q1": q1, "q3": q3, "mean": float(np.mean(values))}


def measure_memory(cfg: CfgNode, train_cfg: CfgNode | None = None) -> dict[str, Any]:
    """Peak memory of one model alone, in processes of its own.

    Args:
        cfg: as the user gives it, with the weights to evaluate.
        train_cfg: of its training, likewise; None for no training.

    Returns:
        Bytes: "baseline" before the model is built, "inference" and "training" at their peak;
        "device": of tensors on "cuda", of the whole process on "cpu". Further the batch sizes.
    """
    baseline, peak = _in_new_process(_inference_memory, cfg)
    memory = {"device": torch.device(cfg.MODEL.DEVICE).type, "baseline": baseline}
    memory |= {"inference": peak, "inference_batch": 1, "training": None}
    if train_cfg is not None:
        memory["training"] = _in_new_process(_training_memory, train_cfg)
        memory["training_batch"] = train_cfg.SOLVER.IMS_PER_BATCH
    return memory


def _in_new_process(measure: Callable[[CfgNode], Any], cfg: CfgNode) -> Any:
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:
        # it imports once, and is small: a fork of this process would begin with its memory
        context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(1, mp_context=context, initializer=_end_with_parent) as pool:
        return pool.submit(measure, cfg).result()


def _end_with_parent() -> None:
    """A comparison that is killed takes this process along, and with it gigabytes."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _inference_memory(cfg: CfgNode) -> tuple[int, int]:
    """Peak before there is a model, and in the end."""
    device = _start_quietly(cfg)
    inputs = test_inputs(cfg, _FEW)
    baseline = _peak(device)
    model = load_model(cfg)
    with torch.no_grad():
        for x in inputs:
            model([x])
    return baseline, _peak(device)


def _training_memory(cfg: CfgNode) -> int:
    device = _start_quietly(cfg)
    trainer = _StillTrainer(cfg, load_model(cfg))
    for _ in range(_FEW):
        trainer.time_step()
    return _peak(device)


def _start_quietly(cfg: CfgNode) -> torch.device:
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    setup_datasets(cfg)
    return torch.device(cfg.MODEL.DEVICE)


def _peak(device: torch.device) -> int:
    """Bytes since the start of the process."""
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
