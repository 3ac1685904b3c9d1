"""The command: what is done in which order, and what the report holds at any time."""

import argparse
import datetime
import hashlib
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog

from solo_d2.arguments import parse, print_error
from solo_d2.data import setup_datasets
from solo_d2.engine import training_folder
from solo_d2.errors import UserError, one_line
from solo_d2.files import atomic_write
from solo_d2.tools import env

from . import accuracy, fairness, measure
from .process import in_process
from .report import summary_columns, write_report
from .runs import Model, Run, make_runs, read_models

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130
# Operations differ between images only by what is found in them.
_FLOP_IMAGES = 3
DATA = ("TRAIN_JSON", "TRAIN_IMAGES", "VAL_JSON", "VAL_IMAGES")


class Comparison:
    """Models, what is known of them so far, and where it is written."""

    def __init__(self, models: Sequence[Model], options: argparse.Namespace, command: str):
        """
        Raises:
            UserError: configs differ where they may not, a folder is of another comparison, there
                are no weights, or the data cannot be registered.
        """
        self.models = models
        self.options = options
        self.output = Path(options.output)
        self.log = self.output / "printed.txt"
        self.command = command
        cfgs = {model.name: model.cfgs for model in models}
        trained = [model for model in models if options.train and not model.weights]
        self.differences = fairness.find_differences(
            cfgs, training=len(trained) > 1, rates=bool(options.lrs)
        )
        fairness.check_fair(self.differences, allow=options.allow_differences)
        first = max(0, models[0].cfgs[0].SEED)
        self.seeds = list(range(first, first + options.seeds))
        self.runs = {m.name: make_runs(m, self.output, self.seeds, options.lrs) for m in models}
        for run in self.all_runs():
            run.check_unchanged()
            if not (options.train or run.model.weights or run.is_finished()):
                raise UserError(
                    f"no weights for {run.model.name}: give --train or --weights (it was not "
                    f"trained in {run.folder})"
                )
        self.data, self.train_sets = _load_data(models[-1].cfgs[-1])
        self.environment = _environment(models[0].cfgs[0])
        self.rows = {model.name: self._empty_row(model) for model in models}
        self.gallery: list[dict[str, Any]] = []
        self.finished = False

    def all_runs(self) -> list[Run]:
        """The first run of every model, then the next of each, to have something of all soon."""
        most = max(map(len, self.runs.values()))
        return [runs[i] for i in range(most) for runs in self.runs.values() if i < len(runs)]

    def best_runs(self, name: str) -> list[Run]:
        """The finished runs of the model's best learning rate."""
        done = [run for run in self.runs[name] if run.is_finished()]
        by_rate: dict[float | None, list[Run]] = {}
        for run in done:
            by_rate.setdefault(run.rate, []).append(run)
        return max(by_rate.values(), key=self._mean_ap, default=[])

    def execute(self) -> bool:
        """Train, evaluate and measure what is not done yet; returns whether nothing failed."""
        runs = self.all_runs()
        self._collect()
        self.write()
        for index, run in enumerate(runs, start=1):
            if run.is_finished():
                continue
            row = self.rows[run.model.name]
            title = f"run {index} of {len(runs)}, {run.model.name}, {run.title}"
            status, row["status"] = row["status"], "training"
            self.write()
            try:
                with Progress(title) as progress:
                    run.execute(progress.show, self.options.num_gpus)
            except Exception as error:  # of one model; the others go on
                self._fail(run, error)
            else:
                row["status"] = status
                self._collect()
            self.write()
        for name in self.rows:
            self._measure_alone(name)
            self.write()
        self._measure_in_turn()
        for row in self.rows.values():
            if row["status"] == "evaluated":
                row["status"] = "finished"
        self.finished = True
        self.write()
        return not any(row["status"] == "failed" for row in self.rows.values())

    def write(self) -> None:
        """report.json with all that is known, and the pages made of it."""
        report = {
            "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "finished": self.finished,
            "command": self.command,
            "environment": self.environment,
            "settings": {
                "train": self.options.train,
                "seeds": self.seeds,
                "rates": list(self.options.lrs),
                "batch": self.options.batch,
                "images_for_timing": self.options.images_for_timing,
                "score_threshold": accuracy.SCORE_THRESHOLD,
            },
            "data": self._describe_data(),
            "differences": [{**x._asdict(), "allowed": x.allowed} for x in self.differences],
            "models": list(self.rows.values()),
            "gallery": self.gallery,
        }
        with atomic_write(self.output / "report.json") as file:
            file.write(json.dumps(report, indent=1, allow_nan=False).encode())
        write_report(report, self.output)

    def table(self) -> str:
        """The main columns for a terminal."""
        report = {"models": list(self.rows.values())}
        columns = [c for c in summary_columns(report) if c.title != "found"]
        names = [
            f"{n} ({r['status']})" if r["status"] != "finished" else n for n, r in self.rows.items()
        ]
        lines = [["model", *(c.title for c in columns)]]
        for name, row in zip(names, self.rows.values()):
            lines.append([name, *(c.text(c.read(row).value) for c in columns)])
        widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
        return "\n".join(
            "  ".join(
                [line[0].ljust(widths[0]), *(x.rjust(w) for x, w in zip(line[1:], widths[1:]))]
            )
            for line in lines
        )

    def _describe_data(self) -> dict[str, Any]:
        objects = (x for x in self.data.coco.anns.values() if not x.get("iscrowd"))
        return {
            "train": self.train_sets,
            "test": [self.data.name],
            "classes": self.data.class_names,
            "images": len(self.data.image_ids),
            "instances": sum(1 for _ in objects),
            "images_train": sum(len(DatasetCatalog.get(name)) for name in self.train_sets) or None,
        }

    def _empty_row(self, model: Model) -> dict[str, Any]:
        run = self.runs[model.name][0]
        trained = run.seed is not None
        solver = run.cfg.SOLVER
        return {
            "name": model.name,
            "config": "+".join(model.files),
            "architecture": fairness.architecture(run.cfg),
            "weights": model.weights,
            "status": "waiting",
            "error": None,
            "memory_error": None,
            "flops_error": None,
            "seeds": [],
            "rates": [],
            "metrics": {},
            "per_class": {},
            "pr_curves": {},
            "best_f1": {},
            "confusion": None,
            "errors": None,
            "input_size": None,
            "latency": [],
            "memory": None,
            "training": {
                "iterations": sum(x.SOLVER.MAX_ITER for x in run.cfgs) if trained else None,
                "images_per_batch": solver.IMS_PER_BATCH if trained else None,
                "images_seen": fairness.images_seen(run.cfgs) if trained else None,
                "seconds_per_iteration": None,
                "step": None,
            },
            "training_curves": [],
        }

    def _fail(self, run: Run, error: Exception) -> None:
        text = one_line(error)
        if not isinstance(error, UserError):
            text = f"{type(error).__name__}: {text} (details: {run.folder})"
        print(f"error: {run.model.name}, {run.title}: {text}", file=sys.stderr, flush=True)
        row = self.rows[run.model.name]
        row["status"], row["error"] = "failed", f"{run.title}: {text}"

    def _collect(self) -> None:
        """Take the accuracy of finished runs into the report."""
        first: dict[str, Run] = {}
        for name, row in self.rows.items():
            done = self.best_runs(name)
            if not done:
                continue
            first[name] = done[0]
            found = [self._accuracy(run) for run in done]
            for task in accuracy.TASKS:
                row["metrics"][task] = accuracy.summarize([x["metrics"][task] for x in found])
                row["per_class"][task] = {
                    c: accuracy.summarize([x["per_class"][task][c] for x in found])
                    for c in found[0]["per_class"][task]
                }
            for key in ("pr_curves", "best_f1", "confusion"):
                row[key] = found[0][key]
            row["seeds"] = [run.seed for run in done if run.seed is not None]
            row["rates"] = self._rates(name)
            row["training_curves"] = [
                {"seed": run.seed, "stage": f"stage{i + 1}" if len(run.cfgs) > 1 else None, **curve}
                for run in done
                for i, folder in enumerate(run.training_folders)
                if (curve := accuracy.training_curve(folder)) is not None
            ]
            folders = [folder for run in done for folder in run.training_folders]
            lines = [line for folder in folders for line in accuracy.read_metrics(folder)]
            row["training"]["seconds_per_iteration"] = measure.iteration_time(lines)
            if row["status"] != "failed":
                row["status"] = "evaluated"
        self.gallery = accuracy.choose_gallery(
            self.data,
            {name: self._accuracy(run)["ious"] for name, run in first.items()},
            {name: run.detections_file for name, run in first.items()},
            count=self.options.gallery,
        )

    def _rates(self, name: str) -> list[dict[str, Any]]:
        """Mask AP at each learning rate that was tried."""
        found = []
        for rate in self.options.lrs:
            runs = [x for x in self.runs[name] if x.rate == rate and x.is_finished()]
            if runs:
                metrics = [self._accuracy(run)["metrics"]["segm"] for run in runs]
                found.append({"rate": rate, "AP": accuracy.summarize(metrics)["AP"]})
        return found

    def _mean_ap(self, runs: Sequence[Run]) -> float:
        found = [self._accuracy(run)["metrics"] for run in runs]
        values = [x["segm"]["AP"] or x["bbox"]["AP"] or 0.0 for x in found]
        return sum(values) / len(values)

    def _accuracy(self, run: Run) -> dict[str, Any]:
        return accuracy.load_accuracy(self.data, run.detections_file, run.results_file)

    def _measure_alone(self, name: str) -> None:
        """What does not depend on how busy the machine is: parameters, FLOPs, memory."""
        runs = self.best_runs(name)
        if runs:
            key = {"run": runs[0].fingerprint, "environment": self.environment}
            path = runs[0].folder.parent / "measures.json"
            self.rows[name].update(_kept(path, key, lambda: self._sizes_and_memory(runs[0])))

    def _sizes_and_memory(self, run: Run) -> dict[str, Any]:
        cfg = _final_cfg(run)
        row: dict[str, Any] = {"memory": None, "memory_error": None, "flops_error": None}
        with Progress(f"measuring {run.model.name}"):
            try:
                row["memory"] = _memory(cfg, run, self.log)
            except Exception as error:  # it ran out of memory, for example
                row["memory_error"] = one_line(error)
            row |= in_process(_sizes, cfg, self.options.images_for_timing, log=self.log)
        if len(run.cfgs) > 1:  # the last stage trains a part only
            row["parameters_trainable"] = None
        return row

    def _measure_in_turn(self) -> None:
        """Latencies and training steps of all models that have weights."""
        runs = {name: found[0] for name in self.rows if (found := self.best_runs(name))}
        if not runs:
            return
        options = self.options
        key = {
            "runs": {name: run.fingerprint for name, run in runs.items()},
            "batch": options.batch,
            "images": options.images_for_timing,
            "steps": options.steps_for_timing,
            "environment": self.environment,
        }

        def measure_all() -> dict[str, Any]:
            final = {name: _final_cfg(run) for name, run in runs.items()}
            trained = {n: _training_cfg(run) for n, run in runs.items() if run.seed is not None}
            work = (final, trained, options.batch, options.images_for_timing)
            with Progress(f"timing {', '.join(runs)} in turn"):
                return in_process(_time, *work, options.steps_for_timing, log=self.log)

        timed = _kept(self.output / "timing.json", key, measure_all)
        for name, row in timed["latency"].items():
            self.rows[name]["latency"] = row
        for name, step in timed["steps"].items():
            self.rows[name]["training"]["step"] = step
        for message in timed["errors"]:
            print(f"warning: {message}", file=sys.stderr)


class Progress:
    """One line on the terminal that says what is done and how long it takes; plain into a pipe."""

    def __init__(self, title: str):
        self._title = title
        self._live = sys.stdout.isatty()

    def __enter__(self) -> "Progress":
        print(self._title, end="" if self._live else "\n", flush=True)
        self._start = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            print(f"\r\033[K{self._title}: {_duration(time.monotonic() - self._start)}", flush=True)

    def show(self, cfg: CfgNode) -> None:
        """The iteration of a training."""
        if not self._live:
            return
        lines = accuracy.read_metrics(Path(cfg.OUTPUT_DIR))[-1:]
        if lines and "iteration" in lines[0]:
            done, last = lines[0]["iteration"] + 1, cfg.SOLVER.MAX_ITER
            left = _duration(lines[0].get("time", 0.0) * (last - done))
            print(
                f"\r\033[K{self._title}: iteration {done} of {last}, ETA {left}", end="", flush=True
            )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code (see ``--help``)."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = parse(_parser(), words)
    return run(options, shlex.join(["solo-d2", "compare", *words]))


def run(options: argparse.Namespace, command: str) -> int:
    """Make the comparison that ``options`` ask for and print its table; returns the exit code."""
    output = Path(options.output)
    started = False
    try:
        if not options.inputs:
            raise UserError("no CONFIG: name the yaml files to compare")
        models = read_models(
            options.inputs,
            options.weights,
            data=options.data or (),
            opts=options.opts,
            iterations=options.iterations,
        )
        with training_folder(str(output), resume=True, overwrite=False):
            comparison = Comparison(models, options, command)
            started = True
            all_done = comparison.execute()
    except KeyboardInterrupt:
        print(f"\ninterrupted; the same command goes on from {output}", file=sys.stderr)
        return EXIT_INTERRUPTED
    except Exception as error:
        print_error(error, options)
        return EXIT_FAILED if started else EXIT_USAGE
    print(f"\n{comparison.table()}\n\nThe report is {(output / 'report.html').absolute()}")
    return EXIT_OK if all_done else EXIT_FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="solo-d2 compare",
        description="Train, evaluate and measure several models on the same data, and write "
        "report.html, report.md and report.json. If it is killed, run the same command again.",
        usage="%(prog)s CONFIG ... --output DIR [options] [KEY VALUE ...]",
        epilog="KEY VALUE pairs override all configs. Exit code: 0 all done, 1 a model failed, 2 "
        "nothing could be started.",
    )
    parser.add_argument(
        "inputs",
        nargs="*",
        metavar="CONFIG",
        help="yaml files, each alone or as NAME=FILE; FILE+FILE is one training in stages",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="also what is resumed")
    parser.add_argument(
        "--weights",
        nargs="+",
        default=[],
        metavar="PTH",
        help="to evaluate, one for each CONFIG; '-' for one that is to be trained",
    )
    parser.add_argument("--train", action="store_true", help="train what has no weights")
    parser.add_argument(
        "--seeds", type=_positive, default=1, metavar="K", help="train with K seeds, from SEED up"
    )
    parser.add_argument(
        "--lrs",
        type=_rates,
        default=(),
        metavar="A,B,C",
        help="train each model with each of these SOLVER.BASE_LR; the best by mask AP counts",
    )
    parser.add_argument(
        "--iterations",
        type=_positive,
        metavar="N",
        help="train each model for N iterations, all stages together, with the steps of the "
        "learning rate in proportion (default: SOLVER.MAX_ITER)",
    )
    parser.add_argument(
        "--data",
        nargs=4,
        metavar=DATA,
        help="your own data, as in solo-d2 train",
    )
    parser.add_argument(
        "--allow-differences",
        action="store_true",
        help="compare configs that differ in data, schedule or evaluation; the report shows them",
    )
    parser.add_argument("--num-gpus", type=_positive, default=1, help="for training")
    add_measuring_options(parser)
    return parser


def add_measuring_options(parser: argparse.ArgumentParser) -> None:
    """What ``solo-d2 report`` has too."""
    for name, default, what in (
        ("batch", 8, "time inference on batches of 1 and of N images"),
        ("images-for-timing", 30, "images of the test set for timing, spread evenly over it"),
        ("steps-for-timing", 10, "training steps of each model that are timed in turn"),
        ("gallery", 12, "images in the report"),
    ):
        help_text = f"{what} (default {default})"
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=help_text)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


def _rates(text: str) -> tuple[float, ...]:
    rates = tuple(float(x) for x in text.split(","))
    if min(rates) <= 0:
        raise argparse.ArgumentTypeError(f"{text}: learning rates must be above 0")
    return tuple(dict.fromkeys(rates))


def _sizes(cfg: CfgNode, images: int) -> dict[str, Any]:
    setup_datasets(cfg)
    model = measure.load_model(cfg)
    inputs = measure.test_inputs(cfg, images)
    row: dict[str, Any] = {"input_size": measure.input_size(inputs)}
    row |= measure.count_parameters(model)
    try:
        row |= measure.count_flops(model, inputs[:_FLOP_IMAGES])
    except Exception as error:  # of a user's own model
        row["flops_error"] = one_line(error)
    return row


def _memory(cfg: CfgNode, run: Run, log: Path) -> dict[str, Any]:
    """Bytes: "baseline" before the model is built, "inference" and "training" at their peak."""
    baseline, peak = in_process(_inference_memory, cfg, log=log)
    device = torch.device(cfg.MODEL.DEVICE).type
    memory = {"device": device, "baseline": baseline, "inference": peak, "inference_batch": 1}
    memory["training"] = None
    if run.seed is not None:
        memory["training"] = in_process(_training_memory, _training_cfg(run), log=log)
        memory["training_batch"] = run.cfg.SOLVER.IMS_PER_BATCH
    return memory


def _inference_memory(cfg: CfgNode) -> tuple[int, int]:
    setup_datasets(cfg)
    return measure.inference_memory(cfg)


def _training_memory(cfg: CfgNode) -> int:
    setup_datasets(cfg)
    return measure.training_memory(cfg)


def _time(
    cfgs: dict[str, CfgNode],
    train_cfgs: dict[str, CfgNode],
    batch_size: int,
    images: int,
    steps: int,
) -> dict[str, Any]:
    errors: list[str] = []
    latency: dict[str, list[dict[str, Any]]] = {name: [] for name in cfgs}
    for cfg in (*cfgs.values(), *train_cfgs.values()):
        setup_datasets(cfg)
    models = {name: measure.load_model(cfg) for name, cfg in cfgs.items()}
    inputs = {name: measure.test_inputs(cfg, images) for name, cfg in cfgs.items()}
    for size in sorted({1, batch_size}):
        batches = {name: measure.make_batches(x, size) for name, x in inputs.items()}
        time_all: Callable = lambda chosen, b=batches: measure.time_inference(chosen, b)  # noqa: E731
        what = f"latency at batch {size}"
        for name, row in measure.without_failing(models, time_all, what, errors).items():
            latency[name].append(row)
    models.clear()
    made: dict[str, Any] = {}
    if train_cfgs and steps:
        models = {name: measure.load_model(cfg) for name, cfg in train_cfgs.items()}
        made = measure.without_failing(
            models,
            lambda chosen: measure.time_training(chosen, cfgs=train_cfgs, steps=steps),
            "training step",
            errors,
        )
    return {"latency": latency, "steps": made, "errors": errors}


def _final_cfg(run: Run) -> CfgNode:
    """Of the model that is evaluated, with its weights."""
    cfg = run.cfg.clone()
    cfg.MODEL.WEIGHTS = run.weights
    return cfg


def _training_cfg(run: Run) -> CfgNode:
    """Of the first stage, with the weights that it ended with."""
    cfg = run.cfgs[0].clone()
    cfg.MODEL.WEIGHTS = str(Path(cfg.OUTPUT_DIR) / "model_final.pth")
    return cfg


def _load_data(cfg: CfgNode) -> tuple[accuracy.TestSet, list[str]]:
    cfg = cfg.clone()
    setup_datasets(cfg)
    return accuracy.TestSet(cfg.DATASETS.TEST[0]), list(cfg.DATASETS.TRAIN)


def _kept(path: Path, key: dict[str, Any], compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What was computed before under the same key, or else now."""
    text = json.dumps(key, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    if path.exists():
        kept = json.loads(path.read_bytes())
        if kept["key"] == digest:
            return kept["value"]
    value = compute()
    with atomic_write(path) as file:
        file.write(json.dumps({"key": digest, "value": value}, indent=1).encode())
    return value


def _environment(cfg: CfgNode) -> dict[str, str]:
    """What the measures depend on."""
    lines, _ = env.report()
    found = dict(line.split("  ", 1) for line in lines)
    # where it is installed says nothing about the results
    found = {name: value.strip().split(" (/")[0] for name, value in found.items()}
    threads = str(torch.get_num_threads())
    return found | {"CPU": _cpu_name(), "threads": threads, "device": cfg.MODEL.DEVICE}


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(x.split(":", 1)[1].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"
