"""Checks before a training run starts."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY

from solo_d2.errors import UserError
from solo_d2.modeling.num_classes import get_value
from solo_d2.modeling.options import check_choice
from solo_d2.modeling.own_keys import refuse_test_time_augmentation

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_POSITIVE = (
    *("SOLVER.MAX_ITER", "SOLVER.IMS_PER_BATCH", "SOLVER.CHECKPOINT_PERIOD", "SOLVER.BASE_LR"),
    *("INPUT.MAX_SIZE_TRAIN", "INPUT.MAX_SIZE_TEST", "MODEL.FPN.OUT_CHANNELS"),
)
_NOT_NEGATIVE = (
    *("SOLVER.BASE_LR_END", "SOLVER.MOMENTUM", "SOLVER.WEIGHT_DECAY", "SOLVER.WARMUP_ITERS"),
    *("SOLVER.REFERENCE_WORLD_SIZE", "MODEL.BACKBONE.FREEZE_AT", "INPUT.MIN_SIZE_TEST"),
    *("DATASETS.OVERFIT_IMAGES", "DATALOADER.NUM_WORKERS", "TEST.PATIENCE", "TEST.VIS_IMAGES"),
)
_CHOICES = {
    "MODEL.FPN.FUSE_TYPE": ("sum", "avg"),
    "INPUT.FORMAT": ("RGB", "BGR", "L", "YUV-BT.601"),
    "INPUT.MASK_FORMAT": ("polygon", "bitmask"),
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": ("choice", "range"),
    "INPUT.RANDOM_FLIP": ("horizontal", "vertical", "none"),
}


def check_config(cfg: CfgNode, world_size: int) -> None:
    """
    Args:
        cfg: config of a training or evaluation.
        world_size: number of processes.

    Raises:
        UserError: a key has an unsupported value; the message names it and what is allowed.
    """
    for key in (*_POSITIVE, *_NOT_NEGATIVE):
        value, least = get_value(cfg, key), "positive" if key in _POSITIVE else "0 or more"
        if not 0 <= value < float("inf") or (value == 0 and key in _POSITIVE):  # NaN too
            raise UserError(f"{key} is {value!r}, but must be {least}")
    solver = cfg.SOLVER
    if solver.LR_SCHEDULER_NAME == "WarmupCosineLR" and solver.BASE_LR_END > solver.BASE_LR:
        raise UserError(
            f"SOLVER.BASE_LR_END is {solver.BASE_LR_END}, but must be at most SOLVER.BASE_LR, "
            f"{solver.BASE_LR}"
        )
    for section in ("RPN", "ROI_HEADS", "RETINANET"):
        _check_matcher(f"MODEL.{section}", cfg.MODEL[section])
    sizes = cfg.INPUT.MIN_SIZE_TRAIN
    if not sizes or min(sizes) < 0:
        raise UserError(f"INPUT.MIN_SIZE_TRAIN is {sizes!r}, but must be numbers of pixels")
    pyramid = [*cfg.MODEL.FPN.IN_FEATURES]
    if cfg.MODEL.BACKBONE.NAME == "build_resnet_fpn_backbone" and pyramid[-1:] != ["res5"]:
        raise UserError(
            f"MODEL.FPN.IN_FEATURES is {pyramid}, but must end with 'res5', which P5 and P6 are "
            "made from"
        )
    reference = solver.REFERENCE_WORLD_SIZE or world_size
    if solver.IMS_PER_BATCH % reference:
        of = "SOLVER.REFERENCE_WORLD_SIZE" if solver.REFERENCE_WORLD_SIZE else "processes"
        raise UserError(
            f"SOLVER.IMS_PER_BATCH is {solver.IMS_PER_BATCH}, but must be a multiple of the "
            f"number of {of}, {reference}"
        )
    if cfg.MODEL.META_ARCHITECTURE not in META_ARCH_REGISTRY:
        raise UserError(
            f"MODEL.META_ARCHITECTURE {cfg.MODEL.META_ARCHITECTURE!r} is not registered; there are "
            f"{', '.join(sorted(name for name, _ in META_ARCH_REGISTRY))}"
        )
    try:
        for key, choices in _CHOICES.items():
            check_choice(key, get_value(cfg, key), choices)
        refuse_test_time_augmentation(cfg)
    except ValueError as error:
        raise UserError(str(error)) from None


def _check_matcher(section: str, options: CfgNode) -> None:
    thresholds, labels = list(options.IOU_THRESHOLDS), list(options.IOU_LABELS)
    if not thresholds or thresholds != sorted(thresholds) or thresholds[0] <= 0:
        raise UserError(
            f"{section}.IOU_THRESHOLDS is {thresholds}, but must be positive numbers, sorted"
        )
    if len(labels) != len(thresholds) + 1 or not {*labels} <= {-1, 0, 1}:
        raise UserError(
            f"{section}.IOU_LABELS is {labels}, but must be one more of -1, 0 and 1 than "
            f"{section}.IOU_THRESHOLDS, {thresholds}"
        )


@contextmanager
def training_folder(folder: str, *, resume: bool, overwrite: bool) -> Iterator[None]:
    """Lock the folder of a training run, so that only one process uses it.

    Args:
        folder: created if it is missing.
        resume: continue the run in it, if there is one.
        overwrite: replace the run in it, if there is one. Its curves, results and pointer to
            the last checkpoint are deleted; checkpoints stay until they are replaced.

    Raises:
        UserError: another process trains in it, or it contains a run but neither ``resume``
            nor ``overwrite`` is set.
    """
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    with open(path / ".lock", "w") as file:
        if fcntl is not None:
            try:
                # The system releases this lock whenever the process ends. Unlike a lock of
                # ``flock``, it is not inherited by data loading processes, which may run longer.
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                raise UserError(f"another process is training in {folder} (OUTPUT_DIR)") from None
        if not resume:
            _make_room(path, overwrite=overwrite)
        yield


def _make_room(folder: Path, *, overwrite: bool) -> None:
    names = ("last_checkpoint", "metrics.json", "results.json", "nonfinite_loss.json")
    found = [folder / name for name in names if (folder / name).exists()]
    if found and not overwrite:
        raise UserError(
            f"{folder} contains a training run ({found[0].name}); continue it with --resume, "
            "replace it with --overwrite, or choose another OUTPUT_DIR"
        )
    for file in [*found, *folder.glob("events.out.tfevents.*")]:
        os.unlink(file)
