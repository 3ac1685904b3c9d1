"""The console output of a training run; its log.txt contains everything."""

import logging
import re
import sys
import warnings

from detectron2.utils.logger import setup_logger

# Loggers whose one-line messages are shown: progress, checkpoints and our own.
_SHOWN = (
    "detectron2.engine.train_loop",
    "detectron2.evaluation.evaluator",
    "detectron2.utils.events",
    "fvcore.common.checkpoint",
    "solo_d2",
)
_ANSI = re.compile(r"\x1b\[[0-9;]*m")


def set_up_logging(output_dir: str, rank: int) -> None:
    """Log to ``output_dir``/log.txt as Detectron2's ``default_setup`` does, and print less.

    Args:
        output_dir: created if it is missing.
        rank: rank of this process; only the first one prints.
    """
    # setup_logger is cached: default_setup repeats the first two calls and adds no handlers
    loggers = [
        setup_logger(output_dir, distributed_rank=rank, name="fvcore"),
        setup_logger(output_dir, distributed_rank=rank),
        setup_logger(output_dir, distributed_rank=rank, name="solo_d2"),
    ]
    # Detectron2 makes tensors of read-only arrays but does not write to them
    warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
    # PyTorch counts the cores; DATALOADER.NUM_WORKERS is the user's choice
    warnings.filterwarnings("ignore", message="This DataLoader will create")
    is_short = Summary()
    for handler in (handler for logger in loggers for handler in logger.handlers):
        if getattr(handler, "stream", None) is not sys.stdout:
            continue
        handler.addFilter(is_short)
        if not sys.stdout.isatty():
            handler.setFormatter(PlainFormatter("[%(asctime)s] %(message)s", "%m/%d %H:%M:%S"))


class Summary(logging.Filter):
    """Passes warnings, and one-line messages of the loggers in ``_SHOWN``, each only once."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno >= logging.WARNING:
            return True
        message = record.getMessage()
        is_shown = any(f"{record.name}.".startswith(f"{name}.") for name in _SHOWN)
        if not is_shown or "\n" in message or message in self._seen:
            return False
        self._seen.add(message)
        return True


class PlainFormatter(logging.Formatter):
    """Removes the color codes that Detectron2 puts into some messages."""

    def format(self, record: logging.LogRecord) -> str:
        return _ANSI.sub("", super().format(record))
