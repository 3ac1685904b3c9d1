"""Curves over the training, and precision over recall."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools.cocoeval import COCOeval

from .measure import quartiles

_DIGITS = 4
_VALIDATION = ("bbox/", "segm/")


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a training's metrics.json; none if there is no such file."""
    path = folder / "metrics.json"
    lines = []
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            lines.append(json.loads(line))
        except ValueError:  # killed while it was written
            continue
    return lines


def training_curve(folder: Path) -> dict[str, Any] | None:
    """Losses and validations of a training, from its metrics.json.

    Returns:
        "iteration", "losses" by name, "validation" with its own "iteration" and AP, bbox and segm;
        None where there are none.
    """
    lines = read_metrics(folder)
    steps = [x for x in lines if "total_loss" in x]
    # an evaluation has a line of its own, or shares one with the losses
    evaluated = [x for x in lines if any(f"{task}AP" in x for task in _VALIDATION)]
    if not steps:
        return None
    names = sorted({k for x in steps for k in x if k.startswith("loss_") or k == "total_loss"})
    validation: dict[str, list] = {"iteration": [x["iteration"] for x in evaluated]}
    for key in ("segm/AP", "bbox/AP"):
        if any(key in x for x in evaluated):
            validation[key] = [number(x.get(key)) for x in evaluated]
    return {
        "iteration": [x["iteration"] for x in steps],
        "losses": {name: [number(x.get(name)) for x in steps] for name in names},
        "validation": validation,
    }


def iteration_time(folders: Sequence[Path]) -> dict[str, float] | None:
    """Quartiles of the logged seconds per iteration, over all stages."""
    times = [x["time"] for folder in folders for x in read_metrics(folder) if "time" in x]
    return quartiles(times) if times else None


def precision_recall(evaluation: COCOeval, class_names: Sequence[str]) -> dict[str, Any]:
    """Precision at 101 recalls, for objects of all sizes and the most detections.

    Returns:
        "recall"; "classes": per class with objects, and "all": their mean, the precisions at IoU
        0.5 ("50"), 0.75 ("75") and on average over COCO's ten IoU thresholds ("mean").
    """
    precision = evaluation.eval["precision"][:, :, :, 0, -1]  # (IoU, recall, class)
    thresholds = evaluation.params.iouThrs
    present = [k for k in range(precision.shape[2]) if (precision[:, :, k] > -1).all()]

    def curves(chosen: np.ndarray) -> dict[str, list[float]]:
        rows = {
            "50": chosen[np.isclose(thresholds, 0.5)][0],
            "75": chosen[np.isclose(thresholds, 0.75)][0],
            "mean": chosen.mean(axis=0),
        }
        return {name: np.round(row, _DIGITS).tolist() for name, row in rows.items()}

    result: dict[str, Any] = {
        "recall": np.round(evaluation.params.recThrs, _DIGITS).tolist(),
        "classes": {class_names[k]: curves(precision[:, :, k]) for k in present},
    }
    if present:
        result["all"] = curves(precision[:, :, present].mean(axis=2))
    return result


def number(value: Any) -> float | None:
    """JSON has no NaN."""
    return None if value is None or not np.isfinite(value) else float(value)
