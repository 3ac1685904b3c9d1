"""The models of a comparison, their trainings and evaluations, each in a folder of its own."""

import argparse
import gc
import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import default_setup, launch
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import setup_logger

from solo_d2.checkpoint import build_checkpointer
from solo_d2.config import load_config
from solo_d2.data import setup_datasets
from solo_d2.engine import Trainer
from solo_d2.errors import UserError, one_line
from solo_d2.evaluation.coco import RESULTS_FILE, write_results
from solo_d2.files import atomic_write

from .fairness import flatten
from .stages import chain_stages, is_finished, leave_log_files

_RECORD = "run.json"
# These may change between a training and its resume.
_NO_INFLUENCE = {
    *("OUTPUT_DIR", "VERSION", "DATALOADER.NUM_WORKERS", "SOLVER.CHECKPOINT_PERIOD"),
    *("TEST.VIS_IMAGES", "TEST.VIS_SCORE_THRESH", "VIS_PERIOD"),
}


@dataclass(frozen=True)
class Model:
    """One row of the comparison."""

    name: str
    files: tuple[str, ...]  # configs, one for each stage of the training
    cfgs: tuple[CfgNode, ...]  # of them, as the user gave them
    weights: str | None  # to evaluate; None: those that the training gives

    @property
    def folder_name(self) -> str:
        return re.sub(r"[^\w.+-]+", "_", self.name)


@dataclass
class Run:
    """A training with one seed and its evaluation, or the evaluation of given weights."""

    model: Model
    seed: int | None  # None: nothing is trained
    folder: Path
    cfgs: tuple[CfgNode, ...]  # of the stages, with OUTPUT_DIR, SEED and weights
    _is_finished: bool = False  # seen before: finding out means to read checkpoints

    @property
    def cfg(self) -> CfgNode:
        """The last stage's, which is evaluated."""
        return self.cfgs[-1]

    @property
    def results_folder(self) -> Path:
        return Path(self.cfg.OUTPUT_DIR)

    @property
    def detections_file(self) -> Path:
        return self.results_folder / "inference" / RESULTS_FILE

    @property
    def results_file(self) -> Path:
        """What an evaluation writes last."""
        return self.results_folder / "results.json"

    @property
    def weights(self) -> str:
        """Of the model that is evaluated."""
        return self.model.weights or str(self.results_folder / "model_final.pth")

    @property
    def record(self) -> dict[str, Any]:
        """What the results depend on, apart from data and code."""
        stages = []
        for i, cfg in enumerate(self.cfgs):
            ignored = _NO_INFLUENCE | ({"MODEL.WEIGHTS"} if i else set())
            stages.append({k: v for k, v in flatten(cfg).items() if k not in ignored})
        return {"weights": _digest(self.cfgs[0].MODEL.WEIGHTS), "stages": stages}

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(self.record, sort_keys=True).encode()).hexdigest()[:16]

    def is_finished(self) -> bool:
        """Whether nothing is left to train or to evaluate."""
        if not self._is_finished and (self.folder / _RECORD).exists():
            evaluated = self.detections_file.exists() and self.results_file.exists()
            trained = self.seed is None or all(map(is_finished, self.cfgs))
            self._is_finished = evaluated and trained
        return self._is_finished

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
        old, new = json.loads(file.read_bytes()), json.loads(json.dumps(self.record))
        changes = _changes(old, new)
        if changes:
            raise UserError(
                f"{self.folder} was made with other settings: {'; '.join(changes)}. Use another "
                "--output, or remove that folder"
            )

    def execute(self, num_gpus: int = 1) -> None:
        """Do what is left: train from the last checkpoint on, evaluate.

        Raises:
            UserError: config, weights or data are wrong.
        """
        self.check_unchanged()
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(self.folder / _RECORD) as file:
            file.write(json.dumps(self.record, indent=1).encode())
        # What trained here is freed before the next: memory is measured and may be short.
        try:
            if self.seed is None:
                _evaluate(self.cfg.clone())
            for cfg in self.cfgs if self.seed is not None else ():
                if not is_finished(cfg):
                    launch(_train, num_gpus, dist_url="auto", args=(cfg.clone(),))
                leave_log_files()
        finally:
            leave_log_files()
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


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
        for other in models[:i]:
            if model.folder_name.lower() == other.folder_name.lower():
                raise UserError(f"two models are called {model.name!r}; write NAME=FILE")
        if len(model.cfgs[-1].DATASETS.TEST) != 1 and not model.cfgs[-1].DATASETS.CUSTOM.VAL_JSON:
            raise UserError(f"{model.name}: DATASETS.TEST must name one data set")
    return models


def set_iterations(cfgs: Sequence[CfgNode], iterations: int) -> None:
    """Make a training longer or shorter, in place, its stages and STEPS in proportion.

    Args:
        cfgs: of its stages.
        iterations: of all stages together.

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


def make_run(model: Model, output: Path, seed: int | None) -> Run:
    """
    Args:
        model: if it has weights, ``seed`` has no meaning.
        output: folder of the comparison.
        seed: of the training; None for an evaluation.
    """
    if model.weights:
        seed = None
    name = "evaluation" if seed is None else f"seed{seed}"
    folder = output / model.folder_name / name
    cfgs = [cfg.clone() for cfg in model.cfgs]
    for cfg in cfgs:
        cfg.OUTPUT_DIR = str(folder)
        if seed is not None:
            cfg.SEED = seed
    chain_stages(cfgs, [f"stage{i + 1}" for i in range(len(cfgs))])
    if model.weights:
        cfgs[-1].MODEL.WEIGHTS = model.weights
    return Run(model, seed, folder, tuple(cfgs))


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Keep a second comparison out of the folder, for as long as this process lives.

    Raises:
        UserError: there is one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        try:
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:  # Windows
            pass
        except OSError:
            raise UserError(f"another comparison is at work in {folder}") from None
        yield


def _train(cfg: CfgNode) -> None:
    """One stage, in each process."""
    try:
        _set_up(cfg)
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=True)
    except (ValueError, KeyError, OSError) as error:
        raise UserError(one_line(error)) from error
    trainer.train()


def _evaluate(cfg: CfgNode) -> None:
    try:
        _set_up(cfg)
        model = Trainer.build_model(cfg)
        build_checkpointer(cfg, model).resume_or_load(cfg.MODEL.WEIGHTS, resume=False)
    except (ValueError, KeyError, OSError) as error:
        raise UserError(one_line(error)) from error
    write_results(Trainer.test(cfg, model), cfg.OUTPUT_DIR)


def _set_up(cfg: CfgNode) -> None:
    """As train_net.py does."""
    setup_datasets(cfg)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="solo_d2")
    cfg.freeze()
    default_setup(cfg, argparse.Namespace(config_file="", eval_only=False))


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
    changes = []
    if len(old["stages"]) != len(new["stages"]):
        changes.append(f"{len(old['stages'])} stages, now {len(new['stages'])}")
    defaults = flatten(load_config())  # of keys that are newer than the record
    same_weights = new["weights"] is not None and old["weights"] == new["weights"]
    for before, after in zip(old["stages"], new["stages"]):
        for key in sorted(before.keys() | after.keys()):
            was, now = before.get(key, defaults.get(key)), after.get(key)
            if was != now and not (key == "MODEL.WEIGHTS" and same_weights):
                changes.append(f"{key} was {was!r}, now it is {now!r}")
    if old["weights"] != new["weights"] and not changes:
        changes.append("the weights file has another content")
    return changes
