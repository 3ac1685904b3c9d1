"""Timing models as users run them: ``solo-d2 benchmark --help``."""

import argparse
import contextlib
import copy
import json
import statistics
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from tabulate import tabulate
from torch import nn

from solo_d2.arguments import add_dtype_argument, parse, print_error
from solo_d2.checkpoint.checkpointer import Checkpointer
from solo_d2.config import load_config, use_available_device
from solo_d2.errors import UserError
from solo_d2.files import atomic_write
from solo_d2.images import as_rgb
from solo_d2.modeling.own_keys import all_keys_honored
from solo_d2.modeling.prepare import precision, prepare, prepare_for_inference
from solo_d2.predictor import Predictor

from .timing import StageClock, differences, peak_memory, profile_operators, random_input, wait


@dataclass
class Subject:
    """One row of the table: a model and its input, for inference or a training step."""

    name: str
    predictor: Predictor
    pixels: np.ndarray  # (H, W, 3) uint8
    images: int
    file: str = ""  # that the pixels were read from
    instances: int | None = None  # in each training image; None: inference
    dtype: str = "float32"
    seconds: list[float] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)  # bytes beyond those before the run
    found: int | None = None  # instances in the first image of the last inference

    def __post_init__(self) -> None:
        self.model = self.predictor.model
        self.device = next(self.model.parameters()).device
        x = self.predictor.network_input(self.pixels)
        self.size = (x.shape[1], x.shape[2])
        if self.instances is not None:
            inputs = random_input(*self.size, self.instances, _num_classes(self.model))
            self.inputs = [{**inputs, "image": x}] * self.images

    def run(self) -> Any:
        if self.instances is None:
            return self.infer(self.read())
        self.model.train().zero_grad()
        with EventStorage(), precision(self.device.type, self.dtype):  # R-CNNs write to the storage
            losses = self.model(self.inputs)
        sum(losses.values()).backward()
        return losses

    def read(self) -> list[dict]:
        """The inputs of an inference."""
        image = self.predictor.network_input(self.pixels)
        height, width = self.pixels.shape[:2]
        return [{"image": image, "height": height, "width": width}] * self.images

    @torch.no_grad()
    def infer(self, inputs: list[dict]) -> list[dict]:
        with precision(self.device.type, self.dtype):
            return self.model(inputs)

    def timed(self) -> None:
        """Run once and note time and memory."""
        with peak_memory(self.device, self.memory):
            start = time.perf_counter()
            results = self.run()
            wait(self.device)
            self.seconds.append(time.perf_counter() - start)
        if self.instances is None and "instances" in results[0]:  # EPS has none
            self.found = len(results[0]["instances"])
        self.model.zero_grad()

    def row(self, stages: dict[str, float], checks: dict[str, Any]) -> dict[str, Any]:
        """The results, with sizes in pixels, times in ms and memory in MiB."""
        median = statistics.median(self.seconds)
        return {
            "model": self.name,
            "what": "inference" if self.instances is None else f"step, {self.instances} objects",
            "size": "{} x {}".format(*self.size),
            "images": self.images,
            "found": self.found,
            "median": 1e3 * median,
            "p90": 1e3 * float(np.quantile(self.seconds, 0.9)),
            "images/s": self.images / median,
            "images/s with reading": self.images / (median + self.images * stages["read"])
            if "read" in stages
            else None,
            "memory": max(self.memory) / 2**20 if self.memory else None,
            **{stage: 1e3 * seconds for stage, seconds in stages.items()},
            **checks,
        }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code: 0, or 2 after an error of one line."""
    options = parse(_parser(), arguments)
    try:
        subjects = _subjects(options)
    except Exception as error:
        print_error(error, options)
        return 2
    device = subjects[0].device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    environment = {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "dtype": options.dtype,
        "compiled": options.compile,
    }
    print(", ".join(f"{key}: {value}" for key, value in environment.items()))
    rows = measure(subjects, warmup=options.warmup, repeat=options.repeat)
    print("times in ms, memory in MiB beyond that of the loaded models\n")
    print(tabulate(rows, "keys", "github", floatfmt=".4g", missingval="-"))
    if options.output:
        with atomic_write(options.output) as file:
            file.write(json.dumps({**environment, "rows": rows}, indent=1).encode())
    if options.profile:
        for subject, row in zip(subjects, rows):
            print(f"\n{row['model']}, {row['what']}, {row['size']}, according to the profiler:")
            profile_operators(subject.run, subject.device, options.rows)
    return 0


def measure(subjects: Sequence[Subject], *, warmup: int, repeat: int) -> list[dict[str, Any]]:
    """Time the subjects in turn, ``repeat`` times, after ``warmup`` runs of each.

    Returns:
        A row for each. An inference has the time of its stages, from runs of their own.
    """
    for subject in subjects:
        for _ in range(warmup):
            subject.run()
    for _ in range(repeat):
        for subject in subjects:
            subject.timed()
    rows = []
    for subject in subjects:
        stages = _stages(subject, repeat) if subject.instances is None else {}
        rows.append(subject.row(stages, _cuda_checks(subject)))
    return rows


def _stages(subject: Subject, repeat: int) -> dict[str, float]:
    """Median seconds of each stage."""
    runs = []
    for _ in range(repeat):
        start = time.perf_counter()
        if subject.file:
            as_rgb(subject.file)
        read = time.perf_counter() - start
        clock = StageClock(subject.model, subject.device)
        start = time.perf_counter()
        inputs = subject.read()
        clock.seconds["preprocess"] = time.perf_counter() - start
        with torch.no_grad(), precision(subject.device.type, subject.dtype):
            clock.run(inputs)
        runs.append({"read": read, **clock.seconds} if subject.file else clock.seconds)
    return {stage: statistics.median(run[stage] for run in runs) for stage in runs[0]}


def _cuda_checks(subject: Subject) -> dict[str, Any]:
    """On CUDA: how often a run waits for the device, and how far it is from the CPU's results."""
    if subject.device.type != "cuda":
        return {}
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        subject.run()
    torch.cuda.set_sync_debug_mode("default")
    checks: dict[str, Any] = {"waits": sum("synchroniz" in str(w.message) for w in caught)}
    if subject.instances is None:
        on_cpu = copy.deepcopy(subject)
        on_cpu.model.cpu().float()
        on_cpu.device, on_cpu.dtype, on_cpu.images = torch.device("cpu"), "float32", 1
        expected, found = (x.run()[0]["instances"].to("cpu") for x in (on_cpu, subject))
        checks |= differences(expected, found)
    return checks


def _subjects(options: argparse.Namespace) -> list[Subject]:
    files = options.weights or [""] * len(options.config_file)
    if len(files) != len(options.config_file):
        raise UserError(f"{len(options.config_file)} --config-file but {len(files)} --weights")
    sizes = options.size or ([None] if options.image else [(800, 1333)])
    photo = as_rgb(options.image) if options.image else None
    subjects = []
    for config, weights in zip(options.config_file, files):
        cfg = load_config(config, opts=options.opts)
        use_available_device(cfg)
        precision(torch.device(cfg.MODEL.DEVICE).type, options.dtype)  # checks it
        for what, counts in (("inference", [None]), ("training", options.instances)):
            if options.only not in (None, what):
                continue
            model = _build(cfg, weights, options.allow_pickle)
            if what == "inference":  # as in prediction
                prepare_for_inference(model, options.dtype)
            if options.compile:
                _compile(model)
            for size, images, n in product(sizes, options.images, counts):
                resize = T.ResizeShortestEdge(cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)
                predictor = Predictor(
                    model,
                    resize=T.Resize(size) if size else resize,
                    input_format=cfg.INPUT.FORMAT,
                    names=[],
                )
                pixels = _noise(size) if photo is None else photo
                common = (Path(config).stem, predictor, pixels, images, options.image)
                subjects.append(Subject(*common, n, options.dtype))
    return subjects


def _noise(size: Sequence[int]) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)


def _compile(model: nn.Module) -> None:
    for part in ("backbone", "head", "mask_branch", "proposal_generator.head"):
        with contextlib.suppress(AttributeError):  # the model has no such part
            model.get_submodule(part).compile()


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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="solo-d2 benchmark",
        usage="%(prog)s --config-file YAML [options] [KEY VALUE ...]",
        description="Time inference and training steps of one or more models in turn.",
    )
    add = parser.add_argument
    add("--config-file", action="append", required=True, metavar="YAML", help="may be repeated")
    add("--weights", action="append", metavar="FILE", help="one for each config (default: random)")
    add("--allow-pickle", action="store_true", help="load weights that may run code")
    add("--image", default="", metavar="FILE", help="resized as in prediction (default: noise)")
    add(
        "--size",
        type=int,
        nargs=2,
        action="append",
        metavar=("H", "W"),
        help="of the network's input; may be repeated (default: 800 1333, or that of the resized "
        "image)",
    )
    add("--images", type=int, nargs="+", default=[1], metavar="N", help="batch sizes")
    add("--instances", type=int, nargs="+", default=[50], metavar="N", help="per training image")
    add("--only", choices=["training", "inference"], help="default: both")
    add_dtype_argument(parser)
    add("--compile", action="store_true", help="run backbone and heads through torch.compile")
    add("--warmup", type=int, default=1, metavar="N", help="runs that do not count")
    add("--repeat", type=int, default=5, metavar="N", help="runs that count")
    add("--output", default="", metavar="FILE", help="also write the results as json")
    add("--profile", action="store_true", help="also list the slowest operators")
    add("--rows", type=int, default=8, metavar="N", help="number of operators to list")
    return parser
