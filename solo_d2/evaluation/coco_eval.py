"""COCO's metrics, computed by faster-coco-eval where it is installed: the same numbers, sooner."""

import contextlib
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from detectron2.evaluation.coco_evaluation import COCOevalMaxDets
from pycocotools.coco import COCO

try:
    from faster_coco_eval import COCOeval_faster
except ImportError:
    COCOeval_faster = None

# Down to the recall of one object among 2 ** 30.
_POWERS = 2.0 ** np.arange(-30, 1)


class FastCOCOeval(COCOevalMaxDets):
    """pycocotools' ``COCOeval`` whose matching and curves are made by faster-coco-eval.

    ``eval`` and ``stats`` are those of pycocotools, to the last bit; ``evalImgs`` is not made.
    """

    def evaluate(self) -> None:
        fast = COCOeval_faster(
            self.cocoGt, self.cocoDt, self.params.iouType, print_function=lambda text: None
        )
        for name in ("imgIds", "catIds", "iouThrs", "maxDets", "areaRng", "areaRngLbl"):
            setattr(fast.params, name, getattr(self.params, name))
        fast.params.recThrs = np.union1d(self.params.recThrs, _POWERS)
        fast.evaluate()
        for name in ("imgIds", "catIds", "maxDets"):  # sorted
            setattr(self.params, name, getattr(fast.params, name))
        self._fast = fast

    def accumulate(self, p: Any = None) -> None:
        self._fast.accumulate()
        precision, recall, scores = (
            np.asarray(self._fast.eval[name]) for name in ("precision", "recall", "scores")
        )
        recalls = self._fast.params.recThrs
        precision = self._as_pycocotools(precision, recalls)
        chosen = np.searchsorted(recalls, self.params.recThrs)
        self.eval = {
            "params": self.params,
            "counts": [precision.shape[0], len(chosen), *precision.shape[2:]],
            "precision": precision[:, chosen],
            "recall": recall,
            "scores": scores[:, chosen],
        }

    def _as_pycocotools(self, precision: np.ndarray, recalls: np.ndarray) -> np.ndarray:
        """Add what pycocotools adds to the denominator of tp / (tp + fp).

        It is lost in rounding, unless the denominator is 1: where only the first detection is
        right and nothing before the second error, the precision is a bit below 1. So look whether
        the second object is found without an error as well, at a recall between 1 and 2 objects.
        """
        count = self._count_objects()[None, None, :, :, None]
        # an interval (1 / n, 2 / n] has one power of two in it
        powers = 2.0 ** np.floor(np.log2(2 / np.maximum(count, 2)))
        at_second = np.take_along_axis(precision, np.searchsorted(recalls, powers), axis=1)
        second = (at_second == 1) & (count > 1)
        return np.where((precision == 1) & ~second, 1 / (1 + np.spacing(1)), precision)

    def _count_objects(self) -> np.ndarray:
        """(classes, area ranges): objects that are to be found."""
        ids = self.cocoGt.getAnnIds(imgIds=self.params.imgIds, catIds=self.params.catIds)
        objects = [x for x in self.cocoGt.loadAnns(ids) if not x.get("iscrowd")]
        areas = np.array([x["area"] for x in objects])[:, None]
        low, high = np.array(self.params.areaRng).T
        inside = (areas >= low) & (areas <= high)
        counts = np.zeros((len(self.params.catIds), len(low)), dtype=int)
        classes = np.searchsorted(self.params.catIds, [x["category_id"] for x in objects])
        np.add.at(counts, classes.astype(int), inside)
        return counts


def mask_score(result: Mapping[str, Any]) -> float:
    """What ranks the mask of a detection in COCO's format: its own score, if it has one."""
    return result.get("mask_score", result["score"])


def evaluate_coco(
    ground_truth: COCO,
    results: Iterable[Mapping[str, Any]],
    iou_type: str,
    *,
    max_dets: Sequence[int] = (1, 10, 100),
    image_ids: Sequence[int] | None = None,
    fast: bool | None = None,
) -> COCOevalMaxDets | None:
    """Evaluate detections by COCO's rules.

    Args:
        ground_truth: of pycocotools.
        results: in COCO's format; stay as they are. For "segm", a "mask_score" takes the place of
            the "score".
        iou_type: "bbox" or "segm".
        max_dets: three numbers of detections per image and class; the last is AP's.
        image_ids: of the images to evaluate; None for all.
        fast: use faster-coco-eval; by default where it is installed.

    Returns:
        A ``COCOeval`` with ``eval`` and ``stats``; None without results, which COCO cannot digest.
    """
    copies = [dict(result) for result in results]
    for result in copies if iou_type == "segm" else ():
        # masks have areas of their own: pycocotools would take a box's where there is one
        result.pop("bbox", None)
        result["score"] = mask_score(result)
    if not copies:
        return None
    fast = COCOeval_faster is not None if fast is None else fast
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = (FastCOCOeval if fast else COCOevalMaxDets)(
            ground_truth, ground_truth.loadRes(copies), iou_type
        )
        evaluation.params.maxDets = list(max_dets)
        if image_ids is not None:
            evaluation.params.imgIds = list(image_ids)
        evaluation.evaluate()
        evaluation.accumulate()
    evaluation.summarize()
    return evaluation
