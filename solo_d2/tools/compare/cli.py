"""The command: what is done in which order, and what the report holds at any time."""

import argparse
import datetime
import hashlib
import json
import logging
import os
import platform
import shlex
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from torch import nn

from solo_d2.config import load_config
from solo_d2.data import setup_datasets
from solo_d2.errors import UserError, one_line
from solo_d2.files import atomic_write
from solo_d2.tools import env

from . import curves, fairness, measure, results
from .report import write_report
from .runs import Model, Run, make_run, only_one, read_models

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130
# Operations differ between images only by what is found in them, and tracing is slow.
_FLOP_IMAGES = 3

logger = logging.getLogger(__name__)


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
        self.command = command
        cfgs = {model.name: model.cfgs for model in models}
        trained = [model for model in models if options.train and not model.weights]
        self.differences = fairness.find_differences(cfgs, training=len(trained) > 1)
        fairness.check_fair(self.differences, allow=options.allow_differences)
        first = max(0, models[0].cfgs[0].SEED)
        self.seeds = list(range(first, first + options.seeds))
        self.runs = {
            model.name: [make_run(model, self.output, seed) for seed in self.seeds][
                : 1 if model.weights else None
            ]
            for model in models
        }
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
        """All models with the first seed, then all with the next, to have something of all soon."""
        most = max(map(len, self.runs.values()))
        return [runs[i] for i in range(most) for runs in self.runs.values() if i < len(runs)]

    def execute(self) -> bool:
        """Train, evaluate and measure what is not done yet; returns whether nothing failed."""
        runs = self.all_runs()
        self._collect([run for run in runs if run.is_finished()])
        self.write()
        for number, run in enumerate(runs, start=1):
            row = self.rows[run.model.name]
            is_first = run is self.runs[run.model.name][0]
            if run.is_finished():
                if is_first:
                    self._measure_alone(run)
                continue
            what = "evaluation" if run.seed is None else f"seed {run.seed}"
            print(f"[{number}/{len(runs)}] {run.model.name}, {what}: {run.folder}", flush=True)
            status, row["status"] = row["status"], "training"
            self.write()
            try:
                run.execute(self.options.num_gpus)
            except Exception as error:  # of one model; the others go on
                self._fail(run, error)
            else:
                row["status"] = status
                self._collect([run])
                if is_first:
                    self._measure_alone(run)
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
                "batch": self.options.batch,
                "images_for_timing": self.options.images_for_timing,
                "score_threshold": results.SCORE_THRESHOLD,
            },
            "data": self._describe_data(),
            "differences": [{**x._asdict(), "allowed": x.allowed} for x in self.differences],
            "models": list(self.rows.values()),
            "gallery": self.gallery,
        }
        with atomic_write(self.output / "report.json") as file:
            file.write(json.dumps(report, indent=1, allow_nan=False).encode())
        write_report(report, self.output)

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
        seen = fairness.images_seen(run.cfgs)
        trained = run.seed is not None
        return {
            "name": model.name,
            "config": "+".join(model.files),
            "architecture": run.cfg.MODEL.META_ARCHITECTURE,
            "weights": model.weights,
            "status": "waiting",
            "error": None,
            "seeds": [],
            "metrics": {},
            "per_class": {},
            "images_evaluated": 0,
            "parameters": None,
            "flops": None,
            "flops_unsupported": {},
            "flops_error": None,
            "input_size": None,
            "latency": [],
            "training": {
                "iterations": sum(cfg.SOLVER.MAX_ITER for cfg in run.cfgs) if trained else None,
                "images_per_batch": run.cfg.SOLVER.IMS_PER_BATCH if trained else None,
                "images_seen": seen if trained else None,
                "seconds_per_iteration": None,
                "step": None,
            },
            "memory": None,
            "training_curves": [],
            "pr_curves": {},
        }

    def _fail(self, run: Run, error: Exception) -> None:
        what = f"{run.model.name}, {'evaluation' if run.seed is None else f'seed {run.seed}'}"
        text = f"{type(error).__name__}: {one_line(error)}"
        if isinstance(error, UserError):
            text = one_line(error)
        else:
            logger.error(f"{what} failed", exc_info=error)
        print(f"error: {what}: {text}", file=sys.stderr, flush=True)
        row = self.rows[run.model.name]
        row["status"] = "failed"
        row["error"] = text if run.seed is None else f"seed {run.seed}: {text}"

    def _collect(self, runs: Sequence[Run]) -> None:
        """Take the accuracy of finished runs into the report."""
        for name in dict.fromkeys(run.model.name for run in runs):
            row = self.rows[name]
            done = [run for run in self.runs[name] if run.is_finished()]
            found = [self._accuracy(run) for run in done]
            for part in ("metrics", "per_class"):
                row[part] = {
                    task: results.summarize([x[part][task] for x in found])
                    for task in results.TASKS
                }
            row["pr_curves"] = found[0]["pr_curves"]
            row["seeds"] = [run.seed for run in done if run.seed is not None]
            row["images_evaluated"] = len(self.data.image_ids)
            row["training_curves"] = [
                {"seed": run.seed, "stage": f"stage{i + 1}" if len(run.cfgs) > 1 else None, **curve}
                for run in done
                for i, cfg in enumerate(run.cfgs)
                if run.seed is not None
                and (curve := curves.training_curve(Path(cfg.OUTPUT_DIR))) is not None
            ]
            folders = [Path(cfg.OUTPUT_DIR) for run in done for cfg in run.cfgs]
            row["training"]["seconds_per_iteration"] = curves.iteration_time(folders)
            if row["status"] != "failed":
                row["status"] = "evaluated"
        if runs:
            first = {name: runs[0] for name, runs in self.runs.items() if runs[0].is_finished()}
            self.gallery = results.make_gallery(
                self.data,
                {name: self._accuracy(run)["ious"] for name, run in first.items()},
                {name: run.detections_file for name, run in first.items()},
                count=self.options.gallery,
            )

    def _accuracy(self, run: Run) -> dict[str, Any]:
        return results.load_accuracy(self.data, run.detections_file, run.results_file)

    def _measure_alone(self, run: Run) -> None:
        """What does not depend on the machine's mood: parameters, FLOPs, memory."""
        row = self.rows[run.model.name]
        key = {"run": run.fingerprint, "environment": self.environment}
        measured = _kept(
            run.folder.parent / "measures.json", key, lambda: self._sizes_and_memory(run)
        )
        row.update(measured)

    def _sizes_and_memory(self, run: Run) -> dict[str, Any]:
        cfg = _final_cfg(run)
        row: dict[str, Any] = {"memory": None, "memory_error": None}
        try:
            train_cfg = None if run.seed is None else _training_cfg(run)
            row["memory"] = measure.measure_memory(cfg.clone(), train_cfg)
        except Exception as error:  # it ran out of memory, for example
            logger.warning(f"memory of {run.model.name} was not measured", exc_info=error)
            row["memory_error"] = one_line(error)
        setup_datasets(cfg)
        model = measure.load_model(cfg)
        inputs = measure.test_inputs(cfg, self.options.images_for_timing)
        row["input_size"] = measure.input_size(inputs)
        row |= measure.count_parameters(model)
        if len(run.cfgs) > 1:  # the last stage trains a part only
            row["parameters_trainable"] = None
        row["flops_error"] = None
        try:
            row |= measure.count_flops(model, inputs[:_FLOP_IMAGES])
        except Exception as error:  # whatever the tracer does not know
            logger.warning(f"FLOPs of {run.model.name} were not counted", exc_info=error)
            row["flops_error"] = one_line(error)
        return row

    def _measure_in_turn(self) -> None:
        """Latencies and training steps of all models that have weights."""
        runs = {name: runs[0] for name, runs in self.runs.items() if runs[0].is_finished()}
        if not runs:
            return
        key = {
            "runs": {name: run.fingerprint for name, run in runs.items()},
            "batch": self.options.batch,
            "images": self.options.images_for_timing,
            "steps": self.options.steps_for_timing,
            "environment": self.environment,
        }
        timed = _kept(self.output / "timing.json", key, lambda: self._time(runs))
        for name, row in timed["latency"].items():
            self.rows[name]["latency"] = row
        for name, step in timed["steps"].items():
            self.rows[name]["training"]["step"] = step
        for message in timed["errors"]:
            print(f"warning: {message}", file=sys.stderr)

    def _time(self, runs: dict[str, Run]) -> dict[str, Any]:
        print(f"Timing {', '.join(runs)} in turn", flush=True)
        errors: list[str] = []
        latency: dict[str, list[dict[str, Any]]] = {name: [] for name in runs}
        models: dict[str, nn.Module] = {}
        inputs: dict[str, measure.Inputs] = {}
        for name, run in runs.items():
            cfg = _final_cfg(run)
            setup_datasets(cfg)
            models[name] = measure.load_model(cfg)
            inputs[name] = measure.test_inputs(cfg, self.options.images_for_timing)
        for batch in sorted({1, self.options.batch}):
            batches = {name: measure.make_batches(x, batch) for name, x in inputs.items()}
            timed = _without_failing(
                models,
                partial(measure.time_inference, batches=batches),
                f"latency at batch {batch}",
                errors,
            )
            for name, row in timed.items():
                latency[name].append(row)
        models.clear()
        steps: dict[str, dict[str, Any]] = {}
        trained = {name: run for name, run in runs.items() if run.seed is not None}
        if trained and self.options.steps_for_timing:
            cfgs = {}
            for name, run in trained.items():
                cfg = cfgs[name] = _training_cfg(run)
                setup_datasets(cfg)
                models[name] = measure.load_model(cfg)
            steps = _without_failing(
                models,
                partial(measure.time_training, cfgs=cfgs, steps=self.options.steps_for_timing),
                "training step",
                errors,
            )
        return {"latency": latency, "steps": steps, "errors": errors}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code (see ``--help``)."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = _parser().parse_intermixed_args(words)
    command = shlex.join(["python", "-m", "solo_d2", "compare", *words])
    output = Path(options.output)
    started = False
    try:
        configs, weights, overrides = _split(options)
        models = read_models(
            configs,
            weights,
            data=options.data or (),
            opts=overrides,
            iterations=options.iterations,
        )
        with only_one(output):
            try:
                comparison = Comparison(models, options, command)
            except (ValueError, KeyError, OSError) as error:  # of the data
                raise UserError(one_line(error)) from error
            for difference in comparison.differences:
                print(f"{difference.group}: {fairness.describe(difference)}")
            started = True
            all_done = comparison.execute()
    except KeyboardInterrupt:
        print(f"interrupted; the same command goes on from {output}", file=sys.stderr)
        return EXIT_INTERRUPTED
    except (UserError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return EXIT_FAILED if started else EXIT_USAGE
    print(f"The report is {(output / 'report.html').absolute()}")
    return EXIT_OK if all_done else EXIT_FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m solo_d2 compare",
        description="Train, evaluate and measure several models on the same data, and write "
        "report.html, report.md and report.json. Killed, the same command goes on where it was.",
        epilog="Exit code: 0 all done, 1 a model failed, 2 nothing could be started.",
    )
    parser.add_argument(
        "words",
        nargs="+",
        metavar="CONFIG",
        help="yaml files, each alone or as NAME=FILE; FILE+FILE is one training in stages; then "
        "config overrides for all of them as KEY VALUE pairs",
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
        "--seeds",
        type=_positive,
        default=1,
        metavar="K",
        help="train with K seeds, SEED and up (default 1)",
    )
    parser.add_argument(
        "--iterations",
        type=_positive,
        metavar="N",
        help="train each model for N iterations, a training in stages for N in all, with steps of "
        "the learning rate in proportion (default: SOLVER.MAX_ITER)",
    )
    parser.add_argument(
        "--data",
        nargs=4,
        metavar=("TRAIN_JSON", "TRAIN_IMAGES", "VAL_JSON", "VAL_IMAGES"),
        help="your own data, as in train_net.py",
    )
    parser.add_argument(
        "--batch",
        type=_positive,
        default=8,
        metavar="N",
        help="time inference on batches of 1 and of N images (default 8)",
    )
    parser.add_argument(
        "--images-for-timing",
        type=_positive,
        default=30,
        metavar="M",
        help="of the test set, spread evenly over it (default 30)",
    )
    parser.add_argument(
        "--steps-for-timing",
        type=int,
        default=10,
        metavar="M",
        help="training steps of each model that are timed in turn (default 10, 0: none)",
    )
    parser.add_argument(
        "--gallery", type=int, default=12, metavar="G", help="images in the report (default 12)"
    )
    parser.add_argument(
        "--allow-differences",
        action="store_true",
        help="compare configs that differ in data, schedule or evaluation; the report shows them",
    )
    parser.add_argument("--num-gpus", type=_positive, default=1, help="for training")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


def _split(options: argparse.Namespace) -> tuple[list[str], list[str], list[str]]:
    """(configs, weights, overrides): the first word that is a config key starts the overrides."""
    known = load_config()

    def is_key(word: str) -> bool:
        return word.split(".")[0] in known and not Path(word).exists()

    words = options.words
    first = next((i for i, word in enumerate(words) if is_key(word)), len(words))
    configs, overrides = words[:first], words[first:]
    # argparse takes overrides that follow --weights for weights
    last = options.weights
    first = next((i for i, word in enumerate(last) if is_key(word)), len(last))
    weights, overrides = last[:first], [*overrides, *last[first:]]
    if not configs:
        raise UserError("no CONFIG before the config overrides")
    if len(overrides) % 2:
        raise UserError(f"config overrides come in pairs KEY VALUE: {' '.join(overrides)}")
    return configs, weights, overrides


def _without_failing(
    models: dict[str, nn.Module],
    time: Callable[[dict[str, nn.Module]], dict[str, Any]],
    what: str,
    errors: list[str],
) -> dict[str, Any]:
    """Time all models, again without the one that fails, for want of memory for example."""
    chosen = dict(models)
    while chosen:
        try:
            return time(chosen)
        except measure.ModelError as error:
            logger.warning(f"{what} of {error.name} was not timed", exc_info=error)
            errors.append(f"{error.name}: no {what}: {one_line(error)}")
            del chosen[error.name]
    return {}


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


def _load_data(cfg: CfgNode) -> tuple[results.TestSet, list[str]]:
    cfg = cfg.clone()
    setup_datasets(cfg)
    return results.TestSet(cfg.DATASETS.TEST[0]), list(cfg.DATASETS.TRAIN)


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
    found = {name: value.strip() for name, value in found.items()}
    # where it is installed says nothing about the results
    found = {name: value.split(" (/")[0] for name, value in found.items()}
    found["CPU"] = _cpu_name()
    found["threads"] = str(torch.get_num_threads())
    found["device"] = cfg.MODEL.DEVICE
    return found


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(x.split(":", 1)[1].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"
