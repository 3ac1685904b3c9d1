"""Training and evaluation of any Detectron2 model."""

from .checks import check_config, training_folder
from .hooks import NonFiniteLossError
from .optimizer import build_optimizer
from .trainer import Trainer

__all__ = [
    "NonFiniteLossError",
    "Trainer",
    "build_optimizer",
    "check_config",
    "training_folder",
]
