"""Training and evaluation of any Detectron2 model."""

from solo_d2.evaluation.coco import write_results

from .launch import launch
from .stages import chain_stages, is_finished, leave_log_files
from .trainer import NonFiniteLossError, Trainer, build_checkpointer, scale_learning_rate

__all__ = [
    "NonFiniteLossError",
    "Trainer",
    "build_checkpointer",
    "chain_stages",
    "is_finished",
    "launch",
    "leave_log_files",
    "scale_learning_rate",
    "write_results",
]
