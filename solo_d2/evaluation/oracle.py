"""Error analysis: how many points of mask AP each kind of error costs.

A cost is COCO's AP with one kind of error corrected, minus the AP as it is. The kinds are those of
TIDE (Bolya et al., 2020) and "masks", the experiment of the SOLO paper. The costs do not add up to
100 - AP, because errors hide each other. That of duplicates can be slightly negative: of two
detections of an object it is the one with the lower score, and may have the better mask.

Shape shorthand: D detections and G objects of an image.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pycocotools.mask as mask_util
from pycocotools.coco import COCO

from .coco_eval import evaluate_coco, mask_score

# Mask IoU from which a detection finds an object, and below which it has found nothing at all.
FOUND, NOTHING = 0.5, 0.1
# COCO's limit on the detections per image and class.
_MAX_DETECTIONS = 100
METRICS = {"AP": 0, "AP50": 1, "APs": 3, "APm": 4, "APl": 5}  # -> index in COCOeval.stats

# Kind of error -> what is changed to correct it.
KINDS = {
    "masks": "every mask becomes that of the object it overlaps most",
    "localization": "right class, mask IoU from 0.1 to 0.5: the mask becomes the object's",
    "classification": "mask IoU from 0.5 with an object of another class: takes its class",
    "both": "mask IoU from 0.1 to 0.5 with an object of another class: removed",
    "duplicate": "the object has been found by a better detection: removed",
    "background": "mask IoU below 0.1 with every object: removed",
    "missed": "objects without a detection, or one to correct, are added with the highest score",
}


class Judged(NamedTuple):
    """A detection and what is wrong with it."""

    result: Mapping[str, Any]
    kind: str  # of KINDS, "correct", or "ignored": a crowd is there
    target: Mapping[str, Any] | None  # object it finds, or finds once it is corrected
    nearest: Mapping[str, Any] | None  # object that its mask overlaps most


def error_costs(
    ground_truth: COCO, results: Sequence[Mapping[str, Any]]
) -> dict[str, dict[str, float | None]]:
    """What each kind of error costs.

    Args:
        ground_truth: a data set loaded by pycocotools.
        results: detections with masks in COCO's format; not modified.

    Returns:
        For "as it is" METRICS in percent, and for each of KINDS by how many points they rise if it
        is corrected; None where there are no objects of that size.
    """
    judged, missed = judge(ground_truth, results)
    now = _metrics(ground_truth, results)
    costs = {"as it is": now}
    for kind in KINDS:
        fixed = _metrics(ground_truth, corrected(judged, missed, kind))
        pairs = ((name, value, now[name]) for name, value in fixed.items())
        costs[kind] = {n: None if x is None or y is None else x - y for n, x, y in pairs}
    return costs


def judge(
    ground_truth: COCO, results: Iterable[Mapping[str, Any]]
) -> tuple[list[Judged], list[dict[str, Any]]]:
    """Name the error of each detection.

    Returns:
        The detections that COCO counts, best first within each image; and the missed objects, which
        are no crowd, with "rle".
    """
    by_image: defaultdict[int, list] = defaultdict(list)
    for result in results:
        by_image[result["image_id"]].append(result)
    judged: list[Judged] = []
    missed = []
    for image_id in ground_truth.getImgIds():
        annotations = ground_truth.imgToAnns.get(image_id, [])
        objects = [{**x, "rle": ground_truth.annToRLE(x)} for x in annotations]
        found = _judge_image(_counted(by_image[image_id]), objects)
        targets = {x.target["id"] for x in found if x.target is not None}
        missed += [x for x in objects if x["id"] not in targets and not x.get("iscrowd")]
        judged += found
    return judged, missed


def corrected(
    judged: Sequence[Judged], missed: Sequence[Mapping[str, Any]], kind: str
) -> list[dict[str, Any]]:
    """The detections without one kind of error, one of KINDS.

    Where a corrected detection finds an object that another one finds too, the better one stays.
    """
    results = [dict(x.result) for x in judged]
    if kind == "masks":
        pairs = zip(results, judged)
        return [{**r, "segmentation": x.nearest["rle"]} if x.nearest else r for r, x in pairs]
    if kind == "missed":
        keys = ("image_id", "category_id")
        added = [{k: x[k] for k in keys} | {"segmentation": x["rle"], "score": 1.0} for x in missed]
        return added + results
    if kind not in ("localization", "classification"):
        return [r for r, x in zip(results, judged) if x.kind != kind]
    kept = []
    taken = set()  # objects
    for result, x in zip(results, judged):
        if x.target is not None and x.kind in ("correct", kind):
            if x.target["id"] in taken:
                continue
            taken.add(x.target["id"])
        if x.target is not None and x.kind == kind:
            corrections = (
                {"segmentation": x.target["rle"]},
                {"category_id": x.target["category_id"]},
            )
            result |= corrections[kind == "classification"]
        kept.append(result)
    return kept


def match(iou: np.ndarray, crowd: Sequence[bool] | np.ndarray) -> list[int | None]:
    """For each detection, best first, the object that it finds: each object is found once.

    Args:
        iou: (D, G) IoU with objects; with a crowd, the share of the detection inside it.
        crowd: (G,). A crowd can be found many times, but only by what finds no object.

    Returns:
        Index of the object with the largest IoU among those left, None below ``FOUND``.
    """
    found: list[int | None] = []
    left = np.ones(len(crowd), dtype=bool)
    objects = ~np.array(crowd, dtype=bool)
    for row in iou:
        row = np.where(left & (row >= FOUND), row + objects, 0.0)
        best = int(row.argmax()) if row.any() else None
        if best is not None:
            left[best] = crowd[best]
        found.append(best)
    return found


def overlaps(masks: Sequence[Mapping], objects: Sequence[Mapping]) -> np.ndarray:
    """(D, G) IoU of RLEs with objects, which have "rle" and may have "iscrowd", for ``match``."""
    if not masks or not objects:
        return np.zeros((len(masks), len(objects)))
    crowd = [int(bool(x.get("iscrowd"))) for x in objects]
    return np.asarray(mask_util.iou(list(masks), [x["rle"] for x in objects], crowd))


def _counted(results: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The detections of an image that COCO counts, best first."""
    counted: list[Mapping[str, Any]] = []
    of_class: Counter[int] = Counter()
    for result in sorted(results, key=mask_score, reverse=True):
        of_class[result["category_id"]] += 1
        if of_class[result["category_id"]] <= _MAX_DETECTIONS:
            counted.append(result)
    return counted


def _judge_image(detections: Sequence[Mapping], objects: Sequence[Mapping]) -> list[Judged]:
    iou = overlaps([x["segmentation"] for x in detections], objects)
    crowd = np.array([bool(x.get("iscrowd")) for x in objects], dtype=bool)
    classes = [np.array([x["category_id"] for x in found]) for found in (detections, objects)]
    same = (classes[0][:, None] == classes[1]).reshape(iou.shape)
    matches = match(np.where(same, iou, 0.0), crowd)
    iou = np.where(crowd, 0.0, iou)
    judged = []
    for detection, index, row, mine in zip(detections, matches, iou, same):
        kind = "correct" if index is not None and not crowd[index] else "ignored"
        if index is None:
            kind, index = _error(np.where(mine, row, 0.0), np.where(mine, 0.0, row))
        nearest = objects[int(row.argmax())] if row.any() else None
        target = None if index is None or crowd[index] else objects[index]
        judged.append(Judged(detection, kind, target, nearest))
    return judged


def _error(own: np.ndarray, other: np.ndarray) -> tuple[str, int | None]:
    """(kind, index of the object that it finds once corrected) of a detection that finds nothing.

    Args:
        own, other: (G,) IoU with the objects of its class and of the others, 0 elsewhere.
    """
    right, wrong = own.max(initial=0.0), other.max(initial=0.0)
    if NOTHING <= right < FOUND:
        return "localization", int(own.argmax())
    if wrong >= FOUND:
        return "classification", int(other.argmax())
    if right >= FOUND:
        return "duplicate", None
    return ("both" if wrong >= NOTHING else "background"), None


def _metrics(ground_truth: COCO, results: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    stats = evaluate_coco(ground_truth, results, "segm").stats
    return {k: None if stats[i] < 0 else 100 * float(stats[i]) for k, i in METRICS.items()}
