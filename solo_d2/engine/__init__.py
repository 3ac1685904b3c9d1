"""Training and evaluation of any Detectron2 model."""

from .checks import check_config, training_folder
from .console import set_up_logging
from .hooks import NonFiniteLossError
from .optimizer import build_optimizer
from .schedule import set_epochs
from .trainer import Trainer

__all__ = [
    "NonFiniteLossError",
    "Trainer",
    "build_optimizer",
    "check_config",
    "set_epochs",
    "set_up_logging",
    "training_folder",
]
