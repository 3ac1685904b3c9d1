"""The models of a comparison, their trainings and evaluations, each in a folder of its own."""

import argparse
import hashlib
import itertools
import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import launch
from detectron2.utils.file_io import PathManager

from solo_d2.config import load_config, use_available_device
from solo_d2.errors import UserError, is_user_error, one_line
from solo_d2.evaluation.coco import RESULTS_FILE
from solo_d2.files import atomic_write
from solo_d2.modeling.prepare import precision
from solo_d2.tools.train import train_or_evaluate

from .fairness import flatten
from .process import in_process

_RECORD = "run.json"
# These may change between a training and its resume.
_NO_INFLUENCE = {
    *("OUTPUT_DIR", "VERSION", "DATALOADER.NUM_WORKERS", "SOLVER.CHECKPOINT_PERIOD"),
    *("MODEL.DEVICE", "TEST.VIS_IMAGES", "TEST.VIS_SCORE_THRESH", "VIS_PERIOD"),
}


@dataclass(frozen=True)
class Model:
    """One row of the comparison."""

    name: str
    files: tuple[str, ...]  # configs, one for each stage of the training
    cfgs: tuple[CfgNode, ...]  # of them, as the user gave them
    weights: str | None = None  # to evaluate; None: those that the training gives

    @property
    def folder_name(self) -> str:
        return re.sub(r"[^\w.+-]+", "_", self.name)


@dataclass(frozen=True)
class Run:
    """A training with one seed and rate and its evaluation, or the evaluation of given weights."""

    model: Model
    seed: int | None  # None: nothing is trained
    rate: float | None  # None: each config's own SOLVER.BASE_LR
    folder: Path
    cfgs: tuple[CfgNode, ...]  # of the stages, with OUTPUT_DIR, SEED and weights
    dtype: str = "float32"  # of an evaluation

    @property
    def title(self) -> str:
        if self.seed is None:
            return "evaluation"
        return ("" if self.rate is None else f"rate {self.rate:g}, ") + f"seed {self.seed}"

    @property
    def detections_file(self) -> Path:
        """Does not exist for a model without instances."""
        return Path(self.cfgs[-1].OUTPUT_DIR) / "inference" / RESULTS_FILE

    @property
    def results_files(self) -> list[Path]:
        """What the evaluation of each stage writes last."""
        return [Path(cfg.OUTPUT_DIR) / "results.json" for cfg in self.cfgs]

    @property
    def training_folders(self) -> list[Path]:
        """Where the logs of the training are, one folder for each stage."""
        if self.model.weights:
            return [Path(self.model.weights).parent]
        return [Path(cfg.OUTPUT_DIR) for cfg in self.cfgs]

    @property
    def final_cfg(self) -> CfgNode:
        """Of the model that is evaluated, with its weights."""
        return self.cfgs[-1] if self.seed is None else _trained(self.cfgs[-1])

    @property
    def training_cfg(self) -> CfgNode | None:
        """Of the first stage, with the weights that it ended with; None: nothing is trained."""
        return None if self.seed is None else _trained(self.cfgs[0])

    @property
    def record(self) -> dict[str, Any]:
        """What the results depend on, apart from data and code."""
        stages = [
            {k: v for k, v in flatten(cfg).items() if k not in _NO_INFLUENCE} for cfg in self.cfgs
        ]
        for stage in stages[1:]:
            del stage["MODEL.WEIGHTS"]
        record = {"weights": _digest(self.cfgs[0].MODEL.WEIGHTS), "stages": stages}
        return record if self.dtype == "float32" else record | {"dtype": self.dtype}

    def is_finished(self) -> bool:
        """Whether nothing is left to train or to evaluate."""
        return all(file.exists() for file in (self.folder / _RECORD, *self.results_files))

    def check_unchanged(self) -> None:
        """
        Raises:
            UserError: the folder is of another config, other weights, or of something else.
        """
        file = self.folder / _RECORD
        if not file.exists():
            if self.folder.is_dir() and any(self.folder.iterdir()):
                raise UserError(f"{self.folder} was not made by a comparison; use another --output")
            return
        if changes := _changes(json.loads(file.read_bytes()), self.record):
            raise UserError(
                f"{self.folder} was made with other settings: {'; '.join(changes)}. Use another "
                "--output, or remove that folder"
            )

    def execute(self, progress: Callable[[CfgNode], None], num_gpus: int = 1) -> None:
        """Do what is left: train from the last checkpoint on, evaluate.

        Args:
            progress: called now and then with the config that is at work.

        Raises:
            UserError: config, weights or data are wrong.
        """
        self.check_unchanged()
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(self.folder / _RECORD) as file:
            file.write(json.dumps(self.record, indent=1).encode())
        options = self.seed is not None, num_gpus, self.dtype
        for cfg, results in zip(self.cfgs, self.results_files):
            if not results.exists():
                log = results.with_name("printed.txt")
                show = partial(progress, cfg)
                in_process(_train_or_evaluate, cfg, *options, log=log, progress=show)


def read_models(
    words: Sequence[str],
    weights: Sequence[str] = (),
    *,
    data: Sequence[str] = (),
    opts: Sequence[str] = (),
    iterations: int | None = None,
) -> list[Model]:
    """
    Args:
        words: "FILE", "NAME=FILE", or "FILE+FILE" for a training in stages.
        weights: for each word a file to evaluate, or "-" for none; or nothing at all.
        data, opts: for all; see ``load_config``.
        iterations: of each training, see ``set_iterations``; None: as in its configs.

    Raises:
        UserError: a file is missing or wrong, names are not distinct, the numbers do not agree.
    """
    if weights and len(weights) != len(words):
        raise UserError(
            f"--weights names {len(weights)} files for {len(words)} configs; '-' stands for none"
        )
    models = []
    for word, file in zip(words, weights or ["-"] * len(words)):
        name, _, files = word.rpartition("=")
        parts = tuple(files.split("+"))
        cfgs = tuple(load_config(part, data=data, opts=opts) for part in parts)
        for cfg in cfgs:
            use_available_device(cfg)
        if iterations is not None:
            set_iterations(cfgs, iterations)
        if file != "-" and len(parts) > 1:
            # the last stage has all parts of the model
            parts, cfgs = parts[-1:], cfgs[-1:]
        given = None if file == "-" else file
        if given and _digest(given) is None and "://" not in given:
            raise UserError(f"no weights {given}")
        models.append(Model(name or _default_name(parts), parts, cfgs, given))
    for i, model in enumerate(models):
        if any(model.folder_name.lower() == x.folder_name.lower() for x in models[:i]):
            raise UserError(f"two models are called {model.name!r}; write NAME=FILE")
        if len(model.cfgs[-1].DATASETS.TEST) != 1 and not model.cfgs[-1].DATASETS.CUSTOM.VAL_JSON:
            raise UserError(f"{model.name}: DATASETS.TEST must name one data set")
    return models


def set_iterations(cfgs: Sequence[CfgNode], iterations: int) -> None:
    """Make a training longer or shorter, in place, its stages and STEPS in proportion.

    Raises:
        UserError: there are fewer iterations than stages.
    """
    if iterations < len(cfgs):
        raise UserError(f"{iterations} iterations are too few for {len(cfgs)} stages")
    left, planned = iterations, sum(cfg.SOLVER.MAX_ITER for cfg in cfgs)
    for number, cfg in enumerate(cfgs, start=1):
        solver = cfg.SOLVER
        share = round(left * solver.MAX_ITER / planned)
        planned -= solver.MAX_ITER
        length = min(max(share, 1), left - (len(cfgs) - number))
        if solver.LR_SCHEDULER_NAME == "WarmupMultiStepLR":  # others do not look at them
            solver.STEPS = tuple(step * length // solver.MAX_ITER for step in solver.STEPS)
        solver.MAX_ITER = length
        left -= length


def make_runs(
    model: Model,
    output: Path,
    seeds: Sequence[int],
    rates: Sequence[float] = (),
    dtype: str = "float32",
) -> list[Run]:
    """All trainings of a model, or the one evaluation of its weights.

    Args:
        output: folder of the comparison.
        seeds: each is trained with each of the rates, or with the configs' own if there are none.
        dtype: of the evaluation of weights.
    """
    root = output / model.folder_name
    if model.weights:
        cfg = model.cfgs[-1].clone()
        cfg.OUTPUT_DIR, cfg.MODEL.WEIGHTS = str(root / "evaluation"), model.weights
        return [Run(model, None, None, root / "evaluation", (cfg,), dtype)]
    runs = []
    for rate, seed in itertools.product(rates or (None,), seeds):
        folder = root / ("" if rate is None else f"rate{rate:g}") / f"seed{seed}"
        cfgs = [cfg.clone() for cfg in model.cfgs]
        for i, cfg in enumerate(cfgs):
            cfg.SEED = seed
            cfg.OUTPUT_DIR = str(folder / f"stage{i + 1}" if len(cfgs) > 1 else folder)
            if i:
                cfg.MODEL.WEIGHTS = _trained(cfgs[i - 1]).MODEL.WEIGHTS
            if rate is not None:
                # later stages keep their rate in proportion to the first's
                cfg.SOLVER.BASE_LR *= rate / model.cfgs[0].SOLVER.BASE_LR
        runs.append(Run(model, seed, rate, folder, tuple(cfgs)))
    return runs


def _train_or_evaluate(cfg: CfgNode, train: bool, num_gpus: int, dtype: str) -> None:
    """As ``solo-d2 train`` with --resume or --eval-only does, the latter in a given type.

    What the user can mend becomes a UserError, which crosses the process.
    """
    args = argparse.Namespace(config_file="", eval_only=not train, resume=train, epochs=None)
    processes = num_gpus if train else 1
    try:
        with precision(torch.device(cfg.MODEL.DEVICE).type, dtype):  # float32 for a training
            launch(train_or_evaluate, processes, dist_url="auto", args=(cfg.clone(), args))
    except Exception as error:
        if is_user_error(error):
            raise UserError(one_line(error)) from error
        raise


def _trained(cfg: CfgNode) -> CfgNode:
    cfg = cfg.clone()
    cfg.MODEL.WEIGHTS = str(Path(cfg.OUTPUT_DIR) / "model_final.pth")
    return cfg


def _default_name(files: Sequence[str]) -> str:
    stems = [Path(file).stem for file in files]
    if len(stems) == 1:
        return stems[0]
    common = re.sub(r"[\W_]*(stage)?[\W_]*$", "", os.path.commonprefix(stems))
    return common or "+".join(stems)


def _digest(path: str) -> str | None:
    """Of the file's content; None where there is no such file here."""
    if "://" in path or not path or not PathManager.isfile(path):
        return None
    with open(PathManager.get_local_path(path), "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


def _changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    counts = [len(record["stages"]) for record in (old, new)]
    changes = [f"{counts[0]} stages, now {counts[1]}"] if counts[0] != counts[1] else []
    defaults = flatten(load_config())  # of keys that are newer than the record
    same_weights = new["weights"] is not None and old["weights"] == new["weights"]
    for before, after in zip(old["stages"], new["stages"]):
        for key in sorted(before.keys() | after.keys()):
            was, now = (stage.get(key, defaults.get(key)) for stage in (before, after))
            if was != now and not (key == "MODEL.WEIGHTS" and same_weights):
                changes.append(f"{key} was {was!r}, now it is {now!r}")
    if old.get("dtype") != new.get("dtype"):
        changes.append("--dtype")
    if old["weights"] != new["weights"] and not changes:
        changes.append("the weights file has another content")
    return changes
