"""What is done in which order, and what the report holds at any time."""

import argparse
import datetime
import json
import os
import platform
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from tqdm import tqdm

from solo_d2.data import setup_datasets
from solo_d2.errors import UserError, one_line
from solo_d2.files import atomic_write
from solo_d2.tools import env

from . import accuracy, fairness, measure
from .process import in_process
from .report import write_report
from .runs import Model, Run, make_runs


class Comparison:
    """Models, what is known of them so far, and where it is written."""

    def __init__(self, models: Sequence[Model], options: argparse.Namespace, command: str):
        """
        Args:
            options: of the command line, see ``cli``.
            command: that line, for the report.

        Raises:
            UserError: configs differ where they may not, a folder is of another comparison, there
                are no weights, or the data cannot be registered.
        """
        self.options = options
        self.output = Path(options.output)
        cfgs = {model.name: model.cfgs for model in models}
        trained = [model for model in models if options.train and not model.weights]
        differences = fairness.find_differences(
            cfgs, training=len(trained) > 1, rates=bool(options.lrs)
        )
        fairness.check_fair(differences, allow=options.allow_differences)
        first = max(0, models[0].cfgs[0].SEED)
        seeds = list(range(first, first + options.seeds))
        self.runs = {
            m.name: make_runs(m, self.output, seeds, options.lrs, options.dtype) for m in models
        }
        for run in self.all_runs():
            run.check_unchanged()
            if not (options.train or run.model.weights or run.is_finished()):
                raise UserError(
                    f"no weights for {run.model.name}: give --train or --weights (it was not "
                    f"trained in {run.folder})"
                )
        cfg = models[-1].cfgs[-1].clone()
        setup_datasets(cfg)
        self.data = accuracy.TestSet(cfg.DATASETS.TEST[0])
        self.lock = threading.Lock()  # of the report, among the threads that train
        self.environment = _environment(models[0].cfgs[0])
        self.rows = {model.name: _empty_row(self.runs[model.name][0]) for model in models}
        self.report = {
            "finished": False,
            "command": command,
            "environment": self.environment,
            "settings": {
                "train": options.train,
                "seeds": seeds,
                "rates": list(options.lrs),
                "batch": options.batch,
                "images_for_timing": options.images_for_timing,
                "dtype": options.dtype,
                "score_threshold": accuracy.SCORE_THRESHOLD,
            },
            "data": _describe_data(self.data, cfg.DATASETS.TRAIN),
            "differences": [x._asdict() for x in differences],
            "models": list(self.rows.values()),
            "gallery": [],
        }

    def all_runs(self) -> list[Run]:
        """The first run of every model, then the next of each, to have something of all soon."""
        most = max(map(len, self.runs.values()))
        return [runs[i] for i in range(most) for runs in self.runs.values() if i < len(runs)]

    def finished_runs(self, name: str) -> dict[float | None, list[Run]]:
        """By learning rate."""
        by_rate: dict[float | None, list[Run]] = {}
        for run in self.runs[name]:
            if run.is_finished():
                by_rate.setdefault(run.rate, []).append(run)
        return by_rate

    def best_runs(self, name: str) -> list[Run]:
        """The finished runs of the model's best learning rate."""
        runs = self.finished_runs(name).values()
        return max(runs, key=lambda x: self._score(x)["mean"] or 0.0, default=[])

    def execute(self) -> bool:
        """Train, evaluate and measure what is not done yet; returns whether nothing failed."""
        runs = self.all_runs()
        self._collect()
        self.write()
        with ThreadPoolExecutor(self.options.jobs) as pool:
            futures = [
                pool.submit(
                    self._execute, run, f"run {i} of {len(runs)}, {run.model.name}, {run.title}"
                )
                for i, run in enumerate(runs, start=1)
                if not run.is_finished()
            ]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        for name in self.rows:
            self._measure_alone(name)
            self.write()
        self._measure_in_turn()
        for row in self.rows.values():
            if row["status"] == "evaluated":
                row["status"] = "finished"
        self.report["finished"] = True
        self.write()
        return not any(row["status"] == "failed" for row in self.rows.values())

    def _execute(self, run: Run, title: str) -> None:
        """Train and evaluate one model, in a thread of its own."""
        row = self.rows[run.model.name]
        with self.lock:
            status, row["status"] = row["status"], "training"
            self.write()
        try:
            with Progress(title) as bar:
                run.execute(bar.show, self.options.num_gpus)
        except Exception as error:  # of one model; the others go on
            with self.lock:
                self._fail(run, error)
                self.write()
        else:
            with self.lock:
                row["status"] = status
                self._collect()
                self.write()

    def write(self) -> None:
        """report.json with all that is known, and the pages made of it."""
        now = datetime.datetime.now(datetime.timezone.utc)
        self.report["created"] = now.isoformat(timespec="seconds")
        with atomic_write(self.output / "report.json") as file:
            file.write(json.dumps(self.report, indent=1, allow_nan=False).encode())
        write_report(self.report, self.output)

    def _fail(self, run: Run, error: Exception) -> None:
        text = one_line(error)
        if not isinstance(error, UserError):
            text = f"{type(error).__name__}: {text} (details: {run.folder})"
        print(f"error: {run.model.name}, {run.title}: {text}", file=sys.stderr, flush=True)
        self.rows[run.model.name] |= {"status": "failed", "error": f"{run.title}: {text}"}

    def _collect(self) -> None:
        """Take the accuracy of finished runs into the report."""
        first: dict[str, Run] = {}
        for name, row in self.rows.items():
            if not (done := self.best_runs(name)):
                continue
            first[name] = done[0]
            found = [self._accuracy(run) for run in done]
            for key in ("metrics", "errors", "per_class"):
                row[key] = accuracy.summarize([x.get(key, {}) for x in found])
            for key in ("pr_curves", "confusion"):
                row[key] = found[0].get(key)
            row["seeds"] = [run.seed for run in done if run.seed is not None]
            row["rates"] = [
                {"rate": rate, "score": self._score(runs)}
                for rate, runs in self.finished_runs(name).items()
                if rate is not None
            ]
            row["training_curves"] = [
                {"seed": run.seed, "stage": f"stage{i + 1}" if len(run.cfgs) > 1 else None, **curve}
                for run in done
                for i, folder in enumerate(run.training_folders)
                if (curve := accuracy.training_curve(folder)) is not None
            ]
            folders = [folder for run in done for folder in run.training_folders]
            lines = [line for folder in folders for line in accuracy.read_metrics(folder)]
            times = [line["time"] for line in lines if "time" in line]
            row["training"]["seconds_per_iteration"] = measure.quartiles(times) if times else None
            if row["status"] != "failed":
                row["status"] = "evaluated"
        with_instances = {n: run for n, run in first.items() if run.detections_file.exists()}
        self.report["gallery"] = accuracy.choose_gallery(
            self.data,
            {name: self._accuracy(run)["ious"] for name, run in with_instances.items()},
            {name: run.detections_file for name, run in with_instances.items()},
            count=self.options.gallery,
        )

    def _score(self, runs: Sequence[Run]) -> dict[str, Any]:
        """The main metric of some runs."""
        return accuracy.summarize([accuracy.main_score(self._accuracy(run)) for run in runs])

    def _accuracy(self, run: Run) -> dict[str, Any]:
        return accuracy.load_accuracy(self.data, run.detections_file, run.results_file)

    def _measure_alone(self, name: str) -> None:
        """What does not depend on how busy the machine is: parameters, FLOPs, memory."""
        if not (runs := self.best_runs(name)):
            return
        run, log, dtype = runs[0], self.output / "printed.txt", self.options.dtype

        def measure_all() -> dict[str, Any]:
            row: dict[str, Any] = {"notes": []}
            images, cfg = self.options.images_for_timing, run.training_cfg
            with Progress(f"measuring {name}"):
                try:
                    work = (run.final_cfg, images, dtype)
                    row = in_process(measure.measure_inference, *work, log=log)
                    if cfg is not None:
                        training = in_process(measure.training_memory, cfg, log=log)
                        row["memory"]["training"] = training
                except Exception as error:  # it ran out of memory, for example
                    row["notes"].append(f"not measured: {one_line(error)}")
            return row

        key = {"run": run.fingerprint, "dtype": dtype, "environment": self.environment}
        self.rows[name] |= accuracy.kept(run.folder.parent / "measures.json", key, measure_all)

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
            "dtype": options.dtype,
            "environment": self.environment,
        }

        def measure_all() -> dict[str, Any]:
            final = {name: run.final_cfg for name, run in runs.items()}
            trained = {n: cfg for n, run in runs.items() if (cfg := run.training_cfg) is not None}
            work = options.batch, options.images_for_timing, options.steps_for_timing, options.dtype
            log = self.output / "printed.txt"
            with Progress(f"timing {', '.join(runs)} in turn"):
                return in_process(measure.measure_times, final, trained, *work, log=log)

        timed = accuracy.kept(self.output / "timing.json", key, measure_all)
        for name in runs:
            row = self.rows[name]
            row["latency"] = timed["latency"][name]
            row["training"]["step"] = timed["steps"].get(name)
            row["notes"] = row["notes"] + timed["notes"][name]


class Progress(tqdm):
    """On a terminal a line with the iteration and what is left; the title alone into a pipe."""

    def __init__(self, title: str):
        if not sys.stdout.isatty():
            print(title, flush=True)
        form = "{desc}: {elapsed}{postfix}"
        super().__init__(
            desc=title, file=sys.stdout, disable=not sys.stdout.isatty(), bar_format=form
        )

    def show(self, cfg: CfgNode) -> None:
        """The iteration of a training, by its log."""
        lines = () if self.disable else accuracy.read_metrics(Path(cfg.OUTPUT_DIR))[-1:]
        for line in lines:
            done, last = line.get("iteration", -1) + 1, cfg.SOLVER.MAX_ITER
            left = self.format_interval(line.get("time", 0.0) * (last - done))
            self.set_postfix_str(f"iteration {done} of {last}, ETA {left}")


def _empty_row(run: Run) -> dict[str, Any]:
    """What is known before anything is done."""
    iterations = sum(x.SOLVER.MAX_ITER for x in run.cfgs) if run.seed is not None else None
    return {
        "name": run.model.name,
        "config": "+".join(run.model.files),
        "architecture": fairness.architecture(run.cfgs[-1]),
        "weights": run.model.weights,
        "status": "waiting",
        "error": None,
        "notes": [],
        "seeds": [],
        "metrics": {},
        "latency": [],
        "memory": {},
        "training": {"iterations": iterations, "seconds_per_iteration": None, "step": None},
    }


def _describe_data(data: accuracy.TestSet, train: Sequence[str]) -> dict[str, Any]:
    objects = (x for x in data.coco.anns.values() if not x.get("iscrowd"))
    return {
        "train": list(train),
        "test": [data.name],
        "classes": data.class_names,
        "images": len(data.file_names),
        "instances": sum(1 for _ in objects),
        "images_train": sum(len(DatasetCatalog.get(name)) for name in train) or None,
    }


def _environment(cfg: CfgNode) -> dict[str, str]:
    """What the measures depend on."""
    lines, _ = env.report()
    found = dict(line.split("  ", 1) for line in lines)
    # where it is installed says nothing about the results
    found = {name: value.strip().split(" (/")[0] for name, value in found.items()}
    info = Path("/proc/cpuinfo")
    names = [x for x in info.read_text().splitlines() if "model name" in x] if info.exists() else []
    cpu = names[0].split(":", 1)[1].strip() if names else platform.processor()
    found["CPU"] = f"{cpu}, {os.cpu_count()} cores"
    return found | {"threads": str(torch.get_num_threads()), "device": cfg.MODEL.DEVICE}
