"""The console output of a training run; its log.txt contains everything."""

import logging
import re
import sys
import warnings

from detectron2.data import DatasetCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from detectron2.utils.events import CommonMetricPrinter, get_event_storage
from detectron2.utils.logger import setup_logger
from tqdm import tqdm

from solo_d2.errors import is_user_error

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
            # Detectron2's loop logs every exception; the command prints these on one line
            error = record.exc_info and record.exc_info[1]
            return not (error and is_user_error(error))
        message = record.getMessage()
        is_shown = any(f"{record.name}.".startswith(f"{name}.") for name in _SHOWN)
        if message.startswith("Inference done") and sys.stderr.isatty():  # see ``ProgressBar``
            return False
        if not is_shown or "\n" in message or message in self._seen:
            return False
        self._seen.add(message)
        return True


class PlainFormatter(logging.Formatter):
    """Removes the color codes that Detectron2 puts into some messages."""

    def format(self, record: logging.LogRecord) -> str:
        return _ANSI.sub("", super().format(record))


def epoch_printer(max_iter: int, epoch: float) -> CommonMetricPrinter:
    """Detectron2's line about the training, which begins with "epoch 3.2/30".

    Args:
        max_iter: iterations of the training.
        epoch: iterations of an epoch.
    """
    printer = CommonMetricPrinter(max_iter)
    printer.logger = _WithEpoch(printer.logger, {"epoch": epoch, "epochs": max_iter / epoch})
    return printer


class _WithEpoch(logging.LoggerAdapter):
    def process(self, message, kwargs):
        done, epochs = (get_event_storage().iter + 1) / self.extra["epoch"], self.extra["epochs"]
        return f"epoch {done:.1f}/{round(epochs, 1):g} {message}", kwargs


class ProgressBar(DatasetEvaluator):
    """Shows on a terminal, and only there, how much of a data set has been evaluated."""

    def __init__(self, dataset_name: str):
        self._name = dataset_name
        self._bar: tqdm | None = None

    def reset(self) -> None:
        if comm.is_main_process() and sys.stderr.isatty():
            images = len(DatasetCatalog.get(self._name))
            total = -(-images // comm.get_world_size())  # of this process
            self._bar = tqdm(total=total, desc=f"Evaluating {self._name}", leave=False)

    def process(self, inputs: list, outputs: list) -> None:
        if self._bar is not None:
            self._bar.update(len(inputs))

    def evaluate(self) -> None:
        if self._bar is not None:
            self._bar.close()
