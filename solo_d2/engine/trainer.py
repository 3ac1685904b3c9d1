"""Detectron2's trainer, extended for these models."""

import importlib
import logging
import os
import signal
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader
from detectron2.engine import DefaultTrainer, HookBase, hooks
from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNNWithTTA
from detectron2.utils import comm
from detectron2.utils.events import CommonMetricPrinter, EventWriter
from torch import nn
from torch.utils.data import DataLoader

from solo_d2.checkpoint import build_checkpointer
from solo_d2.data import build_mapper
from solo_d2.evaluation.build import build_evaluators
from solo_d2.evaluation.coco import summary_lines, write_results
from solo_d2.modeling.own_keys import all_keys_honored
from solo_d2.modeling.prepare import prepare

from .checks import check_config
from .console import ProgressBar, epoch_printer
from .hooks import EarlyStop, KeepBest, StopAtNonFiniteLoss, UntaggedCheckpointer
from .optimizer import build_optimizer
from .sampler import build_train_loader, resumable_sampler


class Trainer(DefaultTrainer):
    """``DefaultTrainer`` for any Detectron2 model, honoring every key of solo_d2.

    It keeps the best model, stops at a loss or gradient that is not finite, draws predictions after
    each evaluation, and continues the stream of images from a checkpoint.
    """

    def __init__(self, cfg: CfgNode):
        """
        Raises:
            UserError: the config is unsuitable; see ``check_config``, ``build_train_loader``.
        """
        check_config(cfg, comm.get_world_size())
        super().__init__(_without_amp_on_cpu(cfg))
        self._trainer.register_hooks([StopAtNonFiniteLoss(self.model, cfg.OUTPUT_DIR)])
        self._sampler = resumable_sampler(self.data_loader)
        self._seed = self._sampler.seed if self._sampler else self.cfg.SEED

    def build_hooks(self) -> list[HookBase]:
        """Detectron2's hooks, with ours inserted at their places."""
        cfg = self.cfg
        self.checkpointer = build_checkpointer(cfg, self.model, trainer=weakref.proxy(self))
        best = UntaggedCheckpointer(
            self.model, cfg.OUTPUT_DIR, thing_classes=self.checkpointer.thing_classes
        )
        self.keep_best = KeepBest(
            cfg.TEST.EVAL_PERIOD, best, best_metric(cfg), patience=cfg.TEST.PATIENCE
        )
        result: list[HookBase] = []
        for hook in filter(None, super().build_hooks()):
            result.append(hook)
            if isinstance(hook, hooks.EvalHook):
                result.append(self.keep_best)
        return result

    def build_writers(self) -> list[EventWriter]:
        """Detectron2's; the printed line also has the epoch, if the data have a length."""
        sampler = resumable_sampler(self.data_loader)
        if sampler is None:
            return super().build_writers()
        printer = epoch_printer(self.max_iter, sampler.images / self.cfg.SOLVER.IMS_PER_BATCH)
        writers = super().build_writers()
        return [printer if isinstance(x, CommonMetricPrinter) else x for x in writers]

    def train(self) -> dict[str, Any]:
        """Train, evaluate, and write results.json; returns the results (main process)."""
        logger = logging.getLogger(__name__)
        self._last_eval_results: dict[str, Any] = {}
        if any(comm.all_gather(self.keep_best.is_exhausted)):
            logger.info("The training was stopped early; it is only evaluated again")
            self._last_eval_results = self.test(self.cfg, self.model)
        else:
            try:
                super().train()
            except EarlyStop:
                logger.info(
                    f"Stopped early after iteration {self.iter}: the last {self.cfg.TEST.PATIENCE} "
                    f"evaluations (TEST.PATIENCE) were no better than that of iteration "
                    f"{self.keep_best.best_iter}"
                )
                self.checkpointer.save("model_final", iteration=self.iter)
        if self.cfg.TEST.AUG.ENABLED:
            self._last_eval_results |= self.test_with_augmentation(self.cfg, self.model)
        if comm.is_main_process():
            write_results(self._last_eval_results, self.cfg.OUTPUT_DIR)
        return self._last_eval_results

    def before_train(self) -> None:
        if self._sampler is not None:
            # ASPECT_RATIO_GROUPING holds a few images back; these are lost or repeated
            batch_size = self.cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size()
            self._sampler.seek(self._seed, self.start_iter * batch_size)
        super().before_train()
        period = self.cfg.TEST.EVAL_PERIOD
        if period > 0 and 0 < self.start_iter < self.max_iter and self.start_iter % period == 0:
            # The process may have been killed between the checkpoint and its evaluation.
            self.iter = self.storage.iter = self.start_iter - 1
            for hook in self._hooks:
                if isinstance(hook, (hooks.EvalHook, KeepBest)):
                    hook.after_step()
            self.iter = self.storage.iter = self.start_iter

    def run_step(self) -> None:
        with _interrupt_at_end():
            super().run_step()

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "seed": self._seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        if self.cfg.SEED < 0:
            self._seed = state.get("seed", self._seed)

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """Detectron2's model, with frozen batch norms folded and in the faster memory format."""
        if "POINT_HEAD" in cfg.MODEL:  # registers its heads; a spawned process has read no config
            importlib.import_module("detectron2.projects.point_rend")
        with all_keys_honored():
            return prepare(super().build_model(cfg))

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        return build_optimizer(cfg, model)

    @classmethod
    def build_lr_scheduler(cls, cfg: CfgNode, optimizer: torch.optim.Optimizer) -> Any:
        if cfg.SOLVER.LR_SCHEDULER_NAME == "WarmupPolyLR":
            from detectron2.projects.deeplab import build_lr_scheduler

            return build_lr_scheduler(cfg, optimizer)
        return super().build_lr_scheduler(cfg, optimizer)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Any:
        return build_train_loader(cfg)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> DataLoader:
        mapper = build_mapper(cfg, is_train=False)
        return build_detection_test_loader(cfg, dataset_name, mapper=mapper)

    @classmethod
    def build_evaluator(
        cls, cfg: CfgNode, dataset_name: str, folder: str = "inference"
    ) -> DatasetEvaluator:
        evaluators = build_evaluators(cfg, dataset_name, os.path.join(cfg.OUTPUT_DIR, folder))
        return DatasetEvaluators([ProgressBar(dataset_name), *evaluators])

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module, evaluators: Any = None) -> dict[str, Any]:
        """Detectron2's, and one line of log for each task."""
        results = super().test(cfg, model, evaluators)
        if comm.is_main_process():
            for line in summary_lines(results):
                logging.getLogger(__name__).info(line)
        return results

    @classmethod
    def test_with_augmentation(cls, cfg: CfgNode, model: nn.Module) -> dict[str, Any]:
        """``test`` with Detectron2's test-time augmentation; results are named "<task>_TTA".

        Raises:
            UserError: the architecture has no test-time augmentation.
        """
        check_config(cfg, comm.get_world_size())
        evaluators = [cls.build_evaluator(cfg, x, "inference_TTA") for x in cfg.DATASETS.TEST]
        results = cls.test(cfg, GeneralizedRCNNWithTTA(cfg, model), evaluators)
        return {f"{name}_TTA": result for name, result in results.items()}


def best_metric(cfg: CfgNode) -> str:
    """TEST.BEST_METRIC, or the model's main metric, on the first of several test sets."""
    name = cfg.TEST.BEST_METRIC
    if not name:
        architecture = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)
        name = getattr(architecture, "best_metric", "segm/AP" if cfg.MODEL.MASK_ON else "bbox/AP")
        if len(cfg.DATASETS.TEST) > 1:
            name = f"{cfg.DATASETS.TEST[0]}/{name}"
    return name


def _without_amp_on_cpu(cfg: CfgNode) -> CfgNode:
    """``cfg``, without mixed precision if that cannot be used."""
    if not cfg.SOLVER.AMP.ENABLED or torch.device(cfg.MODEL.DEVICE).type != "cpu":
        return cfg
    logging.getLogger(__name__).warning(
        "SOLVER.AMP.ENABLED has no effect on the CPU: training in float32"
    )
    cfg = cfg.clone()
    cfg.defrost()
    cfg.SOLVER.AMP.ENABLED = False
    cfg.freeze()
    return cfg


@contextmanager
def _interrupt_at_end() -> Iterator[None]:
    """Delay a first Ctrl-C until the end of the block; a second one interrupts at once.

    Within a step, it would break the connection to a loading process, which prints a traceback.
    """
    if threading.current_thread() is not threading.main_thread():  # other threads get no signals
        yield
        return
    pressed = False

    def handle(*args: Any) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        raise KeyboardInterrupt
