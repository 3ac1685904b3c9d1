"""A schedule in epochs instead of iterations."""

import logging
import math
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.data.build import filter_images_with_only_crowd_annotations

from solo_d2.errors import UserError


def schedule(cfg: CfgNode, *, images: int, epochs: float) -> dict[str, Any]:
    """Config keys and values that scale the config's schedule to a number of epochs.

    Args:
        cfg: its SOLVER and TEST.EVAL_PERIOD are for SOLVER.MAX_ITER iterations.
        images: number of training images.
        epochs: number of times that each image is seen.

    Raises:
        ValueError: there is no image, or the number of epochs is not positive.
    """
    if images < 1:
        raise ValueError("there is no image to train on")
    if not 0 < epochs < math.inf:
        raise ValueError(f"epochs must be a positive number, not {epochs:g}")
    solver = cfg.SOLVER
    iterations = math.ceil(images * epochs / solver.IMS_PER_BATCH)
    scale = iterations / solver.MAX_ITER
    steps = {round(step * scale) for step in solver.STEPS if step < solver.MAX_ITER}
    return {
        "SOLVER.MAX_ITER": iterations,
        "SOLVER.STEPS": tuple(sorted(step for step in steps if 0 < step < iterations)),
        "SOLVER.WARMUP_ITERS": round(solver.WARMUP_ITERS * scale),
        "SOLVER.CHECKPOINT_PERIOD": max(1, round(solver.CHECKPOINT_PERIOD * scale)),
        "TEST.EVAL_PERIOD": cfg.TEST.EVAL_PERIOD and max(1, round(cfg.TEST.EVAL_PERIOD * scale)),
    }


def set_epochs(cfg: CfgNode, epochs: float) -> None:
    """Change the schedule of a config, in place, to a number of epochs of its registered data.

    Raises:
        UserError: a data set has no length.
        ValueError: see ``schedule``.
    """
    images = count_training_images(cfg)
    changes = schedule(cfg, images=images, epochs=epochs)
    cfg.merge_from_list([word for pair in changes.items() for word in pair])
    settings = ", ".join(f"{key.split('.')[1]} {value}" for key, value in changes.items())
    logging.getLogger(__name__).info(
        f"{epochs:g} epochs of {images} images, {cfg.SOLVER.IMS_PER_BATCH} at a time: {settings}"
    )


def count_training_images(cfg: CfgNode) -> int:
    """Number of images in an epoch of DATASETS.TRAIN.

    Raises:
        UserError: a data set has no length.
    """
    count = 0
    for name in cfg.DATASETS.TRAIN:
        records = DatasetCatalog.get(name)
        if not isinstance(records, list):
            raise UserError(f"--epochs: data set {name!r} has no length; set SOLVER.MAX_ITER")
        if cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS and records and "annotations" in records[0]:
            records = filter_images_with_only_crowd_annotations(records)
        count += len(records)
    return count
