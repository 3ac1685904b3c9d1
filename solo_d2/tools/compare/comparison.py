"""What is done in which order, and what the report holds at any time."""

import argparse
import datetime
import json
import os
import platform
import re
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import zip_longest
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
        trained = [model for model in models if options.train and not model.weights]
        differences = fairness.find_differences(
            {model.name: model.cfgs for model in models},
            training=len(trained) > 1,
            rates=bool(options.lrs),
        )
        fairness.check_fair(differences, allow=options.allow_differences)
        first = max(0, models[0].cfgs[0].SEED)
        seeds = list(range(first, first + options.seeds))
        by_model = [make_runs(m, self.output, seeds, options.lrs, options.dtype) for m in models]
        # the first of every model, then the next of each, to have something of all soon
        self.runs = [run for runs in zip_longest(*by_model) for run in runs if run]
        for run in self.runs:
            run.check_unchanged()
            if not (options.train or run.model.weights or run.is_finished()):
                raise UserError(
                    f"no weights for {run.model.name}: give --train or --weights (it was not "
                    f"trained in {run.folder})"
                )
        cfg = models[-1].cfgs[-1].clone()
        setup_datasets(cfg)
        train, self.data = cfg.DATASETS.TRAIN, accuracy.TestSet(cfg.DATASETS.TEST[0])
        self.lock = threading.Lock()  # of the report, among the threads that train
        self.environment = _environment(models[0].cfgs[0])
        self.best: dict[str, list[Run]] = {}  # by model, the finished ones of its best rate
        self.rows = {runs[0].model.name: _empty_row(runs[0]) for runs in by_model}
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
            "data": {
                "train": list(train),
                "test": [self.data.name],
                "classes": self.data.class_names,
                "images": len(self.data.file_names),
                "instances": sum(not x.get("iscrowd") for x in self.data.coco.anns.values()),
                "images_train": sum(len(DatasetCatalog.get(name)) for name in train) or None,
            },
            "differences": [x._asdict() for x in differences],
            "models": list(self.rows.values()),
            "gallery": [],
        }

    def execute(self) -> bool:
        """Train, evaluate and measure what is not done yet; returns whether nothing failed."""
        self._collect()
        with ThreadPoolExecutor(self.options.jobs) as pool:
            futures = [
                pool.submit(self._execute, run, f"run {i} of {len(self.runs)}")
                for i, run in enumerate(self.runs, start=1)
                if not run.is_finished()
            ]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        for name, (run, *_) in self.best.items():
            self._measure_alone(name, run)
            self.write()
        if self.best:
            self._measure_in_turn()
        for row in self.rows.values():
            if row["status"] == "evaluated":
                row["status"] = "finished"
        self.report["finished"] = True
        self.write()
        return not any(row["status"] == "failed" for row in self.rows.values())

    def _execute(self, run: Run, count: str) -> None:
        """Train and evaluate one model, in a thread of its own."""
        row = self.rows[run.model.name]
        with self.lock:
            status, row["status"] = row["status"], "training"
            self.write()
        try:
            with Progress(f"{count}, {run.model.name}, {run.title}") as bar:
                run.execute(bar.show, self.options.num_gpus)
        except Exception as error:  # of one model; the others go on
            text = one_line(error)
            if not isinstance(error, UserError):
                text = f"{type(error).__name__}: {text} (details: {run.folder})"
            print(f"error: {run.model.name}, {run.title}: {text}", file=sys.stderr, flush=True)
            with self.lock:
                row |= {"status": "failed", "error": f"{run.title}: {text}"}
                self.write()
        else:
            with self.lock:
                row["status"] = status
                self._collect()

    def write(self) -> None:
        """report.json with all that is known, and the pages made of it."""
        now = datetime.datetime.now(datetime.timezone.utc)
        self.report["created"] = now.isoformat(timespec="seconds")
        with atomic_write(self.output / "report.json") as file:
            file.write(json.dumps(self.report, indent=1, allow_nan=False).encode())
        write_report(self.report, self.output)

    def _collect(self) -> None:
        """Take the accuracy of finished runs into the report, which is written."""
        self.best = {}
        for name, row in self.rows.items():
            by_rate: dict[float | None, list[Run]] = {}
            for run in self.runs:
                if run.model.name == name and run.is_finished():
                    by_rate.setdefault(run.rate, []).append(run)
            if not by_rate:
                continue
            scores = {
                rate: accuracy.summarize([accuracy.main_score(self._accuracy(x)) for x in runs])
                for rate, runs in by_rate.items()
            }
            done = by_rate[max(scores, key=lambda rate: scores[rate]["mean"] or 0.0)]
            self.best[name] = done
            found = [self._accuracy(run) for run in done]
            for key in ("metrics", "errors", "per_class"):
                row[key] = accuracy.summarize([x.get(key, {}) for x in found])
            for key in ("pr_curves", "confusion"):
                row[key] = found[0].get(key)
            row["seeds"] = [run.seed for run in done if run.seed is not None]
            row["rates"] = [{"rate": x, "score": y} for x, y in scores.items() if x is not None]
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
        files = {name: runs[0].detections_file for name, runs in self.best.items()}
        files = {name: file for name, file in files.items() if file.exists()}
        ious = {name: self._accuracy(self.best[name][0])["ious"] for name in files}
        gallery = accuracy.choose_gallery(self.data, ious, files, count=self.options.gallery)
        self.report["gallery"] = gallery
        self.write()

    def _accuracy(self, run: Run) -> dict[str, Any]:
        return accuracy.load_accuracy(self.data, run.detections_file, run.results_files[-1])

    def _measure_alone(self, name: str, run: Run) -> None:
        """What does not depend on how busy the machine is: parameters, FLOPs, memory."""
        log, dtype, cfg = self.output / "printed.txt", self.options.dtype, run.training_cfg

        def compute() -> dict[str, Any]:
            row: dict[str, Any] = {"notes": []}
            work = (run.final_cfg, self.options.images_for_timing, dtype)
            with Progress(f"measuring {name}"):
                try:
                    row = in_process(measure.measure_inference, *work, log=log)
                    if cfg is not None:
                        training = in_process(measure.training_memory, cfg, log=log)
                        row["memory"]["training"] = training
                except Exception as error:  # it ran out of memory, for example
                    row["notes"].append(f"not measured: {one_line(error)}")
            return row

        key = {"run": run.record, "dtype": dtype, "environment": self.environment}
        self.rows[name] |= accuracy.kept(run.folder.parent / "measures.json", key, compute)

    def _measure_in_turn(self) -> None:
        """Latencies and training steps of all models that have weights."""
        runs, options = {name: runs[0] for name, runs in self.best.items()}, self.options
        work = {
            "batch_size": options.batch,
            "images": options.images_for_timing,
            "steps": options.steps_for_timing,
            "dtype": options.dtype,
        }

        def compute() -> dict[str, Any]:
            final = {name: run.final_cfg for name, run in runs.items()}
            trained = {n: cfg for n, run in runs.items() if (cfg := run.training_cfg) is not None}
            call = partial(measure.measure_times, final, trained, **work)
            with Progress(f"timing {', '.join(runs)} in turn"):
                return in_process(call, log=self.output / "printed.txt")

        records = {name: run.record for name, run in runs.items()}
        key = {"runs": records, "environment": self.environment} | work
        timed = accuracy.kept(self.output / "timing.json", key, compute)
        for name in runs:
            row = self.rows[name]
            row["latency"] = timed["latency"][name]
            row["training"]["step"] = timed["steps"].get(name)
            row["notes"] = row["notes"] + timed["notes"][name]


class Progress(tqdm):
    """On a terminal a line with the iteration and what is left; the title alone into a pipe."""

    def __init__(self, title: str):
        shown = sys.stdout.isatty()
        if not shown:
            print(title, flush=True)
        form = "{desc}: {elapsed}{postfix}"
        super().__init__(desc=title, file=sys.stdout, disable=not shown, bar_format=form)

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


def _environment(cfg: CfgNode) -> dict[str, str]:
    """What the measures depend on."""
    lines, _ = env.report()
    # where it is installed says nothing about the results
    found = dict(line.split(" (/")[0].split(maxsplit=1) for line in lines)
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", info.read_text() if info.exists() else "")
    cpu = names[0] if names else platform.processor()
    found["CPU"] = f"{cpu}, {os.cpu_count()} cores"
    return found | {"threads": str(torch.get_num_threads()), "device": cfg.MODEL.DEVICE}
