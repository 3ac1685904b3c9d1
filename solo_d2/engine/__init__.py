"""Training and evaluation of any Detectron2 model."""

from .evaluation import write_results
from .launch import launch
from .trainer import NonFiniteLossError, Trainer, build_checkpointer, scale_learning_rate

__all__ = [
    "NonFiniteLossError",
    "Trainer",
    "build_checkpointer",
    "launch",
    "scale_learning_rate",
    "write_results",
]
