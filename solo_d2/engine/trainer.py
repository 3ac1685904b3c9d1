"""Detectron2's trainer that resumes exactly, stops at a loss that is not finite, and knows CPUs."""

import importlib
import json
import logging
import os
import time
import weakref
from typing import Any

import torch
import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog, build_detection_test_loader
from detectron2.engine import DefaultTrainer, SimpleTrainer, create_ddp_model, hooks
from detectron2.engine.train_loop import TrainerBase
from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators
from detectron2.modeling import GeneralizedRCNN
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from fvcore.nn.precise_bn import get_bn_modules
from torch import Tensor, nn
from torch.utils.data import DataLoader

from solo_d2.checkpoint.checkpointer import Checkpointer
from solo_d2.data.mapper import InstanceMapper
from solo_d2.errors import UserError
from solo_d2.evaluation.coco import InstanceEvaluator, PredictionPictures, write_results
from solo_d2.evaluation.panoptic import PanopticEvaluator
from solo_d2.files import atomic_write

from .hooks import (
    BestCheckpointer,
    CheckpointBeforeEvaluation,
    EventHistory,
    MetricWriters,
    StepSeed,
)
from .loader import TrainLoader, build_train_loader

# Architectures whose outputs have "panoptic_seg" for any data set.
_PANOPTIC_ARCHITECTURES = {"AdaptIS"}


class NonFiniteLossError(UserError):
    """A loss was inf or NaN."""


def _is_worth_a_traceback(record: logging.LogRecord) -> bool:
    return not (record.exc_info and isinstance(record.exc_info[1], UserError))


# Detectron2's loop logs whatever ends it with a traceback; a UserError says all in its message.
logging.getLogger("detectron2.engine.train_loop").addFilter(_is_worth_a_traceback)


class Trainer(DefaultTrainer):
    """``DefaultTrainer`` for any Detectron2 model.

    A training that is killed and resumed goes on with the batches, augmentations, random numbers
    and logged values that it would have had.
    """

    def __init__(self, cfg: CfgNode):
        """
        Raises:
            UserError: the config cannot be trained; see also ``build_train_loader``.
        """
        TrainerBase.__init__(self)
        self.cfg = cfg = DefaultTrainer.auto_scale_workers(cfg, comm.get_world_size())
        self.seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
        # False while a checkpoint is written whose iteration is still to be evaluated.
        self.step_finished = True

        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        data_loader = self.build_train_loader(cfg)
        device = torch.device(cfg.MODEL.DEVICE)
        # DistributedDataParallel takes device_ids for CUDA models only.
        options = {} if device.type == "cuda" else {"device_ids": None}
        model = create_ddp_model(model, broadcast_buffers=False, **options)
        self._trainer = StepTrainer(
            model,
            data_loader,
            optimizer,
            device=device,
            amp=cfg.SOLVER.AMP.ENABLED,
            max_grad_norm=cfg.SOLVER.CLIP_TOTAL_GRAD_NORM,
            stop_on_nonfinite=cfg.SOLVER.STOP_ON_NONFINITE_LOSS,
            output_dir=cfg.OUTPUT_DIR,
        )
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = build_checkpointer(cfg, model, trainer=weakref.proxy(self))
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.register_hooks(self.build_hooks())

    def build_hooks(self) -> list[hooks.HookBase | None]:
        """Detectron2's hooks, in an order in which the last checkpoint has seen all others."""
        cfg = self.cfg
        period, eval_period = cfg.SOLVER.CHECKPOINT_PERIOD, cfg.TEST.EVAL_PERIOD
        precise_bn = None
        if cfg.TEST.PRECISE_BN.ENABLED and get_bn_modules(self.model):
            loader_cfg = cfg.clone()
            loader_cfg.defrost()
            loader_cfg.DATALOADER.NUM_WORKERS = 0
            precise_bn = hooks.PreciseBN(
                eval_period,
                self.model,
                self.build_train_loader(loader_cfg),
                cfg.TEST.PRECISE_BN.NUM_ITER,
            )
        best = writers = None
        if comm.is_main_process():
            writers = MetricWriters(cfg.OUTPUT_DIR)
            if cfg.TEST.BEST_METRIC:
                best = BestCheckpointer(
                    eval_period,
                    build_checkpointer(cfg, self.model, tag_last=False),
                    cfg.TEST.BEST_METRIC,
                )
        return [
            StepSeed(),
            EventHistory(),
            hooks.IterationTimer(),
            hooks.LRScheduler(),
            precise_bn,
            CheckpointBeforeEvaluation(self.checkpointer, period, eval_period),
            hooks.EvalHook(eval_period, self._evaluate),
            best,
            writers,
            hooks.PeriodicCheckpointer(self.checkpointer, period),
        ]

    def train(self) -> dict[str, Any]:
        """Train, evaluate, and write results.json; returns the results (main process)."""
        super().train()
        results = getattr(self, "_last_eval_results", None) or {}
        if comm.is_main_process():
            write_results(results, self.cfg.OUTPUT_DIR)
        return results

    def before_train(self) -> None:
        if isinstance(self.data_loader, TrainLoader):
            self.data_loader.seek(self.seed, self.start_iter)
        super().before_train()
        if not self.step_finished:
            self._finish_step()

    def after_train(self) -> None:
        self.iter = min(self.iter, self.max_iter)  # one more when nothing was left to do
        super().after_train()

    def _finish_step(self) -> None:
        """What the killed process would have done after the checkpoint, its evaluation first."""
        self.iter = self.storage.iter = self.start_iter - 1
        names = [type(hook) for hook in self._hooks]
        for hook in self._hooks[names.index(CheckpointBeforeEvaluation) + 1 :]:
            self.step_finished = True
            hook.after_step()
        self.iter = self.storage.iter = self.start_iter

    def _evaluate(self) -> dict[str, Any]:
        self._last_eval_results = self.test(self.cfg, self.model)
        return self._last_eval_results

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "seed": self.seed, "step_finished": self.step_finished}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.step_finished = state.get("step_finished", True)
        if self.cfg.SEED < 0:
            self.seed = state.get("seed", self.seed)

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """Detectron2's, in the layout in which its convolutions are quickest on the CPU."""
        if "POINT_HEAD" in cfg.MODEL:  # registers its heads: a process of its own read no config
            importlib.import_module("detectron2.projects.point_rend")
        model = super().build_model(cfg)
        # The other architectures choose for themselves.
        if isinstance(model, GeneralizedRCNN) and cfg.MODEL.DEVICE == "cpu":
            model.to(memory_format=torch.channels_last)
        return model

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """Detectron2's SGD, or AdamW with the same parameter groups.

        Raises:
            ValueError: SOLVER.OPTIMIZER is neither.
        """
        solver = cfg.SOLVER
        if solver.OPTIMIZER == "SGD":
            return super().build_optimizer(cfg, model)
        if solver.OPTIMIZER != "AdamW":
            raise ValueError(f"SOLVER.OPTIMIZER must be 'SGD' or 'AdamW', not {solver.OPTIMIZER!r}")
        groups = get_default_optimizer_params(
            model,
            base_lr=solver.BASE_LR,
            weight_decay_norm=solver.WEIGHT_DECAY_NORM,
            bias_lr_factor=solver.BIAS_LR_FACTOR,
            weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
        )
        optimizer = torch.optim.AdamW(
            groups, lr=solver.BASE_LR, weight_decay=solver.WEIGHT_DECAY, foreach=True
        )
        return maybe_add_gradient_clipping(cfg, optimizer)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> TrainLoader:
        return build_train_loader(cfg)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> DataLoader:
        mapper = InstanceMapper(cfg, is_train=False)
        return build_detection_test_loader(cfg, dataset_name, mapper=mapper)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluators:
        output_dir = os.path.join(cfg.OUTPUT_DIR, "inference")
        evaluators: list[DatasetEvaluator] = [
            InstanceEvaluator(dataset_name, output_dir=output_dir)
        ]
        if cfg.MODEL.META_ARCHITECTURE in _PANOPTIC_ARCHITECTURES:
            evaluators.append(PanopticEvaluator(dataset_name))
        if cfg.TEST.VIS_IMAGES > 0:
            pictures = PredictionPictures(
                dataset_name,
                cfg.OUTPUT_DIR,
                num_images=cfg.TEST.VIS_IMAGES,
                score_threshold=cfg.TEST.VIS_SCORE_THRESH,
                max_iter=cfg.SOLVER.MAX_ITER,
            )
            evaluators.append(pictures)
        return DatasetEvaluators(evaluators)


class StepTrainer(SimpleTrainer):
    """One optimization step, in float32 or mixed precision, that never applies NaN gradients.

    Detectron2's trainers wait for the device once per loss; this does it once per step, for all
    losses of all processes.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: Any,
        optimizer: torch.optim.Optimizer,
        *,
        device: torch.device,
        amp: bool = False,
        max_grad_norm: float = 0.0,
        stop_on_nonfinite: bool = True,
        output_dir: str = "",
    ):
        """
        Args:
            model: gives named losses of a batch.
            data_loader: of batches.
            optimizer: of the model's parameters.
            device: of the model.
            amp: mixed precision: float16 with scaled gradients on CUDA, bfloat16 on the CPU.
            max_grad_norm: limit on the L2 norm of all gradients together, 0 for none.
            stop_on_nonfinite: raise at a loss that is inf or NaN; else skip its step.
            output_dir: of nonfinite_loss.json.
        """
        super().__init__(model, data_loader, optimizer)
        self._device = device
        self._max_grad_norm = max_grad_norm
        self._stop_on_nonfinite = stop_on_nonfinite
        self._output_dir = output_dir
        dtype = torch.float16 if device.type == "cuda" else torch.bfloat16
        self._autocast = lambda: torch.autocast(device.type, dtype=dtype, enabled=amp)
        # bfloat16 has the range of float32, so its gradients need no scaling
        scaling = amp and dtype == torch.float16
        self._scaler = torch.amp.GradScaler(device.type, enabled=scaling)
        if amp and not scaling:
            logging.getLogger(__name__).warning(
                "SOLVER.AMP.ENABLED on the CPU: bfloat16 instead of float16"
            )

    def run_step(self) -> None:
        assert self.model.training, "the model was changed to eval mode"
        start = time.perf_counter()
        batch = next(self._data_loader_iter)
        data_time = time.perf_counter() - start

        with self._autocast():
            losses = self.model(batch)
            if isinstance(losses, Tensor):
                losses = {"total_loss": losses}
            total = sum(losses.values())
        self.optimizer.zero_grad()
        self._scaler.scale(total).backward()
        self.after_backward()

        # After the backward pass is queued, so that a GPU is busy while this waits.
        names = list(losses)
        *values, data_times = self._gather([*losses.values(), torch.tensor(data_time)])
        if not all(_all_finite(v) for v in values):
            self._refuse_step(dict(zip(names, values)), batch)
            return
        if self._max_grad_norm > 0:
            self._scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self._max_grad_norm)
        self._scaler.step(self.optimizer)
        self._scaler.update()
        if comm.is_main_process():
            means = {name: sum(v) / len(v) for name, v in zip(names, values)}
            storage = get_event_storage()
            storage.put_scalar("data_time", max(data_times), cur_iter=self.iter)
            storage.put_scalar("total_loss", sum(means.values()), cur_iter=self.iter)
            means.pop("total_loss", None)
            storage.put_scalars(cur_iter=self.iter, **means)

    def _gather(self, scalars: list[Tensor]) -> list[list[float]]:
        """For each scalar its values in all processes."""
        mine = torch.stack([x.detach().to(self._device, torch.float64) for x in scalars])
        world_size = comm.get_world_size()
        every = [mine]
        if world_size > 1:
            every = [torch.empty_like(mine) for _ in range(world_size)]
            dist.all_gather(every, mine)
        return torch.stack(every, dim=1).tolist()

    def _refuse_step(self, losses: dict[str, list[float]], batch: list[dict[str, Any]]) -> None:
        """Every process comes here, since each has seen all losses."""
        bad = [name for name, values in losses.items() if not _all_finite(values)]
        if not self._stop_on_nonfinite:
            logging.getLogger(__name__).warning(
                f"iteration {self.iter}: {', '.join(bad)} not finite; no step is made"
            )
            return
        images = [{k: x.get(k) for k in ("image_id", "file_name")} for x in batch]
        processes = comm.gather(images)
        path = os.path.join(self._output_dir, "nonfinite_loss.json")
        if comm.is_main_process():
            report = {
                "iteration": self.iter,
                "processes": [
                    {
                        "images": part,
                        "losses": {k: _json_number(v[rank]) for k, v in losses.items()},
                    }
                    for rank, part in enumerate(processes)
                ],
            }
            with atomic_write(path) as file:
                file.write(json.dumps(report, indent=1, default=str).encode())
        comm.synchronize()  # the first process that ends takes the others with it
        raise NonFiniteLossError(
            f"iteration {self.iter}: {', '.join(bad)} not finite; the images of the batch are in "
            f"{path}, the weights before it in the last checkpoint"
        )

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "grad_scaler": self._scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        if state.get("grad_scaler") and self._scaler.is_enabled():
            self._scaler.load_state_dict(state["grad_scaler"])


def build_checkpointer(cfg: CfgNode, model: nn.Module, **options: Any) -> Checkpointer:
    """A checkpointer in OUTPUT_DIR that knows the classes of the config's data."""
    thing_classes = None
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        thing_classes = thing_classes or MetadataCatalog.get(name).get("thing_classes")
    return Checkpointer(
        model,
        cfg.OUTPUT_DIR,
        thing_classes=thing_classes,
        skip_mismatched=cfg.MODEL.WEIGHTS_SKIP_MISMATCHED,
        **options,
    )


def scale_learning_rate(cfg: CfgNode) -> None:
    """Multiply SOLVER.BASE_LR by IMS_PER_BATCH / LR_REFERENCE_BATCH, in place, and say so.

    The linear scaling rule of arXiv 1706.02677. The config then has its own batch size as
    reference, so that a dump of it can be used again.
    """
    solver = cfg.SOLVER
    if solver.LR_REFERENCE_BATCH in (0, solver.IMS_PER_BATCH):
        return
    old = solver.BASE_LR
    solver.BASE_LR = old * solver.IMS_PER_BATCH / solver.LR_REFERENCE_BATCH
    logging.getLogger(__name__).info(
        f"SOLVER.BASE_LR {old:g} for a batch of {solver.LR_REFERENCE_BATCH} becomes "
        f"{solver.BASE_LR:g} for a batch of {solver.IMS_PER_BATCH}"
    )
    solver.LR_REFERENCE_BATCH = solver.IMS_PER_BATCH


def _all_finite(values: list[float]) -> bool:
    return all(v - v == 0 for v in values)


def _json_number(value: float) -> float | str:
    """JSON has no NaN and no infinity."""
    return value if _all_finite([value]) else str(value)
