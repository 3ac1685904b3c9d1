"""Trainings in turn, each from the final model of the one before (AdaptIS has two of them)."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.utils.logger import setup_logger

from solo_d2.checkpoint.load import load_weights_file
from solo_d2.errors import UserError

_FINAL = "model_final.pth"


def chain_stages(cfgs: Sequence[CfgNode], names: Sequence[str]) -> None:
    """Let each stage start from the final model of the one before, in place.

    Args:
        cfgs: of the stages. If all have one OUTPUT_DIR, because it was overridden, each gets the
            folder of its name in there.
        names: of the stages; distinct.

    Raises:
        UserError: two stages would write to the same folder.
    """
    folders = {cfg.OUTPUT_DIR for cfg in cfgs}
    if len(cfgs) > 1 and len(folders) == 1 and len(set(names)) == len(names):
        for cfg, name in zip(cfgs, names):
            cfg.OUTPUT_DIR = os.path.join(cfg.OUTPUT_DIR, name)
    elif len(folders) < len(cfgs):
        raise UserError(f"the stages {', '.join(names)} need an OUTPUT_DIR each")
    for before, cfg in zip(cfgs, cfgs[1:]):
        cfg.MODEL.WEIGHTS = os.path.join(before.OUTPUT_DIR, _FINAL)


def is_finished(cfg: CfgNode) -> bool:
    """Whether the training of ``cfg`` has made all its iterations and its last evaluation."""
    folder = Path(cfg.OUTPUT_DIR)
    final, results, last = folder / _FINAL, folder / "results.json", folder / "last_checkpoint"
    if not (final.exists() and results.exists() and last.exists()):
        return False
    # An older evaluation may be of an earlier training in the same folder.
    if last.read_text() != _FINAL or results.stat().st_mtime < final.stat().st_mtime:
        return False
    done = load_weights_file(final).get("iteration")
    return done is not None and done + 1 >= cfg.SOLVER.MAX_ITER


def leave_log_files() -> None:
    """Let the next stage in this process log to its own folder, and not to earlier ones too."""
    for name in ("detectron2", "fvcore", "solo_d2"):
        logger = logging.getLogger(name)
        for handler in list(logger.handlers):
            logger.removeHandler(handler)
    setup_logger.cache_clear()  # it would take the handlers for those still there
