"""Hooks that make a resumed training equal to one that never stopped."""

import json
import os
from pathlib import Path
from typing import Any

from detectron2.engine import HookBase, hooks
from detectron2.utils import comm
from detectron2.utils.events import CommonMetricPrinter, JSONWriter, TensorboardXWriter

from solo_d2.files import atomic_write

from .loader import seed_step

# Iterations over which Detectron2's writers smooth what they write.
_WINDOW = 20
# These tell about the process, not about the training.
_CLOCKS = {"time", "data_time", "rank_data_time", "eta_seconds"}


class StepSeed(HookBase):
    """Seed the model's random numbers from the trainer's seed and the iteration."""

    def before_step(self) -> None:
        seed_step(self.trainer.seed, self.trainer.iter, comm.get_rank())


class EventHistory(HookBase):
    """Keep the logged values that later ones are smoothed with."""

    def __init__(self) -> None:
        self._loaded: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        storage = getattr(self.trainer, "storage", None)
        if storage is None:
            return {}
        state = {}
        for name, buffer in storage.histories().items():
            if name in _CLOCKS:
                continue
            values = buffer.values()
            last = values[-1][1]
            recent = [[v, i] for v, i in values[-10 * _WINDOW :] if i > last - _WINDOW]
            state[name] = {"values": recent, "smooth": storage.smoothing_hints()[name]}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._loaded = state

    def before_train(self) -> None:
        for name, scalar in self._loaded.items():
            for value, iteration in scalar["values"]:
                self.trainer.storage.put_scalar(
                    name, value, smoothing_hint=scalar["smooth"], cur_iter=iteration
                )


class MetricWriters(hooks.PeriodicWriter):
    """Console, metrics.json and TensorBoard, all continued where the checkpoint was made."""

    def __init__(self, output_dir: str, period: int = 20):
        super().__init__([], period)
        self._output_dir = output_dir
        self._last_written: int | None = None
        self._metrics: MetricsFile | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"last_written": self._metrics.last_written} if self._metrics else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._last_written = state["last_written"]

    def before_train(self) -> None:
        start_iter = self.trainer.start_iter
        last_written = start_iter - 1 if self._last_written is None else self._last_written
        os.makedirs(self._output_dir, exist_ok=True)
        self._metrics = MetricsFile(os.path.join(self._output_dir, "metrics.json"), last_written)
        self._writers = [
            CommonMetricPrinter(self.trainer.max_iter),
            self._metrics,
            TensorboardXWriter(self._output_dir, purge_step=start_iter),
        ]


class MetricsFile(JSONWriter):
    """metrics.json without the lines of iterations that will be repeated."""

    def __init__(self, path: str, last_written: int):
        """
        Args:
            path: a file of another training that started at iteration 0 is kept as
                "*.previous.json".
            last_written: lines of later iterations are removed.
        """
        file = Path(path)
        if file.exists() and last_written < 0:
            file.replace(file.with_suffix(".previous.json"))
        elif file.exists():
            kept = [x for x in file.read_bytes().splitlines() if _iteration(x) <= last_written]
            with atomic_write(file) as whole:
                whole.writelines(line + b"\n" for line in kept)
        super().__init__(path)
        self._last_write = last_written

    @property
    def last_written(self) -> int:
        return self._last_write


def _iteration(line: bytes) -> float:
    try:
        return json.loads(line)["iteration"]
    except ValueError:  # killed while writing it
        return float("inf")


class BestCheckpointer(hooks.BestCheckpointer):
    """Detectron2's, with its best value kept across a resume."""

    def state_dict(self) -> dict[str, Any]:
        return {"best_metric": self.best_metric, "best_iter": self.best_iter}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best_metric, self.best_iter = state["best_metric"], state["best_iter"]


class CheckpointBeforeEvaluation(hooks.PeriodicCheckpointer):
    """An evaluation that crashes or is killed costs no training.

    Where a checkpoint and an evaluation fall together, this makes the checkpoint first. It is
    marked as unfinished, so that a resume evaluates and then goes on; the one that is made after
    the evaluation replaces it.
    """

    def __init__(self, checkpointer: Any, period: int, eval_period: int):
        super().__init__(checkpointer, period)
        self._eval_period = eval_period

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        # Detectron2 evaluates the last iteration after the training.
        if done == self.trainer.max_iter or self._eval_period <= 0:
            return
        if done % self.period == 0 and done % self._eval_period == 0:
            self.trainer.step_finished = False
            super().after_step()
            self.trainer.step_finished = True
