"""COCO's metrics, computed by faster-coco-eval if installed: the same numbers in less time."""

import contextlib
import io
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from detectron2.evaluation.coco_evaluation import COCOevalMaxDets
from pycocotools.coco import COCO

try:
    from faster_coco_eval import COCOeval_faster
except ImportError:
    COCOeval_faster = None


def mask_score(result: Mapping[str, Any]) -> float:
    """The score that ranks the mask of a detection in COCO's format: the mask's own, if any."""
    return result.get("mask_score", result["score"])


def evaluate_coco(
    ground_truth: COCO,
    results: Iterable[Mapping[str, Any]],
    iou_type: str,
    *,
    max_dets: Sequence[int] = (1, 10, 100),
    image_ids: Sequence[int] | None = None,
    fast: bool | None = None,
) -> Any:
    """Evaluate detections by COCO's rules.

    Args:
        ground_truth: a data set loaded by pycocotools.
        results: in COCO's format; not modified. For "segm", a "mask_score" replaces the "score".
        iou_type: "bbox" or "segm".
        max_dets: three limits on the detections per image and class; AP uses the last.
        image_ids: ids of the images to evaluate; None for all.
        fast: use faster-coco-eval; by default if it is installed.

    Returns:
        A ``COCOeval`` with ``eval`` and ``stats``, equal to those of pycocotools up to rounding.
    """
    copies = [dict(result) for result in results]
    for result in copies if iou_type == "segm" else ():
        # a mask has its own area, but pycocotools would use the area of the box if there is one
        result.pop("bbox", None)
        result["score"] = mask_score(result)
    fast = bool(copies) and COCOeval_faster is not None if fast is None else fast and bool(copies)
    with contextlib.redirect_stdout(io.StringIO()):
        detections = _load(ground_truth, copies)
        if fast:
            evaluation = COCOeval_faster(ground_truth, detections, iou_type, extra_calc=False)
        else:
            evaluation = COCOevalMaxDets(ground_truth, detections, iou_type)
        evaluation.params.maxDets = list(max_dets)
        if image_ids is not None:
            evaluation.params.imgIds = list(image_ids)
        evaluation.evaluate()
        evaluation.accumulate()
    for name in ("precision", "recall", "scores"):
        evaluation.eval[name] = np.asarray(evaluation.eval[name])
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        COCOevalMaxDets.summarize(evaluation)
    logging.getLogger(__name__).info(f"{iou_type}:\n{printed.getvalue()}")
    return evaluation


def _load(ground_truth: COCO, results: list[dict[str, Any]]) -> COCO:
    """``COCO.loadRes``, which fails if there are no results."""
    if results:
        return ground_truth.loadRes(results)
    empty = COCO()
    empty.dataset = {**ground_truth.dataset, "annotations": []}
    empty.createIndex()
    return empty
