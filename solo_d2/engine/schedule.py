"""A schedule in epochs instead of iterations."""

import logging
import math

from detectron2.config import CfgNode

from solo_d2.errors import UserError

from .sampler import training_records


def set_epochs(cfg: CfgNode, epochs: float) -> None:
    """Scale the schedule of a config, in place, to a number of epochs of its registered data.

    Args:
        cfg: its SOLVER and TEST.EVAL_PERIOD are for SOLVER.MAX_ITER iterations.
        epochs: number of times that each image is seen.

    Raises:
        UserError: a data set has no length or no image, or the number of epochs is not positive.
    """
    if not 0 < epochs < math.inf:
        raise UserError(f"--epochs must be a positive number, not {epochs:g}")
    records = training_records(cfg)
    if not hasattr(records, "__len__"):
        raise UserError("--epochs: DATASETS.TRAIN has no length; set SOLVER.MAX_ITER")
    solver = cfg.SOLVER
    iterations = math.ceil(len(records) * epochs / solver.IMS_PER_BATCH)
    scale = iterations / solver.MAX_ITER
    steps = {round(step * scale) for step in solver.STEPS if step < solver.MAX_ITER}
    changes = {
        "SOLVER.MAX_ITER": iterations,
        "SOLVER.STEPS": tuple(sorted(step for step in steps if 0 < step < iterations)),
        "SOLVER.WARMUP_ITERS": round(solver.WARMUP_ITERS * scale),
        "SOLVER.CHECKPOINT_PERIOD": max(1, round(solver.CHECKPOINT_PERIOD * scale)),
        "TEST.EVAL_PERIOD": cfg.TEST.EVAL_PERIOD and max(1, round(cfg.TEST.EVAL_PERIOD * scale)),
    }
    cfg.merge_from_list([word for pair in changes.items() for word in pair])
    settings = ", ".join(f"{key.split('.')[1]} {value}" for key, value in changes.items())
    logging.getLogger(__name__).info(
        f"{epochs:g} epochs of {len(records)} images, {solver.IMS_PER_BATCH} at a time: {settings}"
    )
