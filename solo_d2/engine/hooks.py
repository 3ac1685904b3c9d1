"""The hooks that Detectron2 lacks."""

import json
import logging
import math
import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import Tensor, nn

from solo_d2.checkpoint import Checkpointer
from solo_d2.errors import UserError
from solo_d2.files import atomic_write

# Mixed precision halves its loss scale after each overflow. Below this scale, gradients are NaN.
_MIN_LOSS_SCALE = 2.0**-24


class NonFiniteLossError(UserError):
    """A loss or a gradient was inf or NaN."""


class EarlyStop(BaseException):
    """Ends the training loop. Detectron2 logs a traceback for every ``Exception``."""


class StopAtNonFiniteLoss(HookBase):
    """Stops the training before a step with a loss or gradient that is inf or NaN.

    Register it with Detectron2's ``SimpleTrainer`` or ``AMPTrainer``. In mixed precision, gradients
    may overflow; then ``GradScaler`` skips the step and lowers the scale.
    """

    def __init__(self, model: nn.Module, output_dir: str):
        """
        Args:
            model: the module that is called with the batches, that is, DistributedDataParallel if
                it is used.
            output_dir: folder of nonfinite_loss.json.
        """
        self._output_dir = output_dir
        self._images: list[dict[str, Any]] = []
        self._losses: dict[str, Tensor] = {}
        model.register_forward_hook(self._remember)

    def _remember(self, model: nn.Module, args: tuple, output: Any) -> None:
        if model.training:
            self._images = [{k: x.get(k) for k in ("image_id", "file_name")} for x in args[0]]
            losses = {"total_loss": output} if isinstance(output, Tensor) else output
            self._losses = {name: loss.detach() for name, loss in losses.items()}

    def after_backward(self) -> None:
        total = sum(self._losses.values(), torch.zeros(())).float()
        scaler = getattr(self.trainer, "grad_scaler", None)
        norm = None
        if scaler is None:
            # without a limit, this only computes the norm
            norm = nn.utils.clip_grad_norm_(self.trainer.model.parameters(), math.inf)
            total = total + norm
        if comm.get_world_size() > 1:
            dist.all_reduce(total)  # so that all processes stop together
        if not math.isfinite(total.item()):
            self._stop(norm)
        if scaler is not None and scaler.get_scale() < _MIN_LOSS_SCALE:
            raise NonFiniteLossError(
                f"iteration {self.trainer.iter}: gradients are inf or NaN at every loss scale; "
                "train with SOLVER.AMP.ENABLED False to see at which image"
            )

    def _stop(self, norm: Tensor | None) -> None:
        losses = {name: loss.item() for name, loss in self._losses.items()}
        bad = {name for name, loss in losses.items() if not math.isfinite(loss)}
        report = {name: loss if math.isfinite(loss) else str(loss) for name, loss in losses.items()}
        processes = comm.all_gather({"images": self._images, "losses": report, "bad": bad})
        bad = set().union(*(process.pop("bad") for process in processes))
        path = os.path.join(self._output_dir, "nonfinite_loss.json")
        iteration = self.trainer.iter
        if comm.is_main_process():
            content = {
                "iteration": iteration,
                "gradient_norm": None if norm is None else str(norm.item()),
                "processes": processes,
            }
            with atomic_write(path) as file:
                file.write(json.dumps(content, indent=1, default=str).encode())
        comm.synchronize()  # the first process that exits ends the others
        raise NonFiniteLossError(
            f"iteration {iteration}: {', '.join(sorted(bad)) or 'the gradient'} is not finite; the "
            f"images of the batch are in {path}, earlier weights in the last checkpoint"
        )


@dataclass(eq=False)
class KeepBest(HookBase):
    """Saves model_best.pth after each evaluation that is better than all earlier ones.

    Unlike Detectron2's ``BestCheckpointer`` it survives a resume, leaves "last_checkpoint" alone,
    and can end the training run.
    """

    period: int  # of the evaluations; their ``EvalHook`` must come before this hook
    checkpointer: Checkpointer  # writes the file in the main process
    metric: str  # the one to maximize, for example "segm/AP"
    patience: int = 0  # stop after so many evaluations in a row without improvement; 0: never
    best: float | None = None
    best_iter: int | None = None
    waited: int = 0  # evaluations in a row without improvement

    @property
    def is_exhausted(self) -> bool:
        return 0 < self.patience <= self.waited

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if self.period > 0 and done % self.period == 0 and done != self.trainer.max_iter:
            self._compare()
            if any(comm.all_gather(self.is_exhausted)):  # only the main process has results
                raise EarlyStop

    def after_train(self) -> None:
        if self.trainer.iter + 1 >= self.trainer.max_iter:
            self._compare()

    def _compare(self) -> None:
        if not comm.is_main_process():
            return
        logger, latest = logging.getLogger(__name__), self.trainer.storage.latest()
        if self.metric not in latest:
            logger.warning(
                f"TEST.BEST_METRIC {self.metric!r} is not among the results, so no model_best.pth "
                f"is written; there are {sorted(name for name in latest if '/' in name)}"
            )
            return
        value, iteration = latest[self.metric]
        if not math.isfinite(value) or (self.best is not None and value <= self.best):
            self.waited += 1
            return
        self.best, self.best_iter, self.waited = value, iteration, 0
        self.checkpointer.save("model_best", iteration=iteration)
        logger.info(f"model_best.pth: {self.metric} {value:.3f} after iteration {iteration}")

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "best_iter": self.best_iter, "waited": self.waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if not isinstance(state["best"], int | float | None):
            raise TypeError(f"the best {self.metric} is {state['best']!r}, not a number")
        self.best, self.best_iter, self.waited = (state[k] for k in self.state_dict())


class UntaggedCheckpointer(Checkpointer):
    """Saves checkpoints that a resumed training does not start from."""

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        pass
