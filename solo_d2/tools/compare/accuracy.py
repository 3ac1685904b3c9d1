"""What a run's detections are worth, its training curves, and how models differ image by image."""

import contextlib
import io
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from solo_d2.evaluation.coco_eval import evaluate_coco, mask_score
from solo_d2.evaluation.oracle import error_costs, match, overlaps
from solo_d2.files import atomic_write

TASKS = ("segm", "bbox")
# In the order of ``COCOeval.stats``.
METRICS = "AP AP50 AP75 APs APm APl AR1 AR10 AR100 ARs ARm ARl".split()
MAIN_METRICS = {"segm": "AP", "bbox": "AP", "sem_seg": "mIoU"}
# Detections that count as a model's answer, in the gallery and in the confusion matrix.
SCORE_THRESHOLD = 0.3
# The gallery draws at most this many detections per image; more would hide each other.
_MOST_DETECTIONS = 40
_VERSION = 3  # of accuracy.json; raise it when its content changes


class TestSet:
    """A registered data set; ``coco`` has its annotations if it has instances."""

    __test__ = False  # pytest would take it for a test

    def __init__(self, name: str):
        metadata = MetadataCatalog.get(name)
        records = DatasetCatalog.get(name)  # those of label maps have no ids
        self.file_names = {x.get("image_id", x["file_name"]): x["file_name"] for x in records}
        self.name = name
        self.class_names = list(metadata.get("thing_classes") or metadata.get("stuff_classes", []))
        ids = metadata.get("thing_dataset_id_to_contiguous_id")
        ids = ids or {i: i for i in range(len(self.class_names))}
        self.category_names = {c: self.class_names[i] for c, i in ids.items()}
        self.coco = COCO()
        if "json_file" in metadata.as_dict():
            with contextlib.redirect_stdout(io.StringIO()):
                self.coco = COCO(metadata.json_file)

    def objects(self, image_id: int) -> list[dict[str, Any]]:
        """Annotations with "rle", their masks; crowds come last."""
        annotations = self.coco.imgToAnns.get(image_id, ())
        ordered = sorted(annotations, key=lambda x: x.get("iscrowd", 0))
        return [{**x, "rle": self.coco.annToRLE(x)} for x in ordered]


def load_accuracy(data: TestSet, detections_file: Path, results_file: Path) -> dict[str, Any]:
    """``evaluate_detections`` of a run, computed once and kept beside its results.

    "metrics" has what else is in results.json, too: those of label maps and of panoptic masks. A
    model that writes no detections has those alone.
    """
    kept = results_file.with_name("accuracy.json")
    if kept.exists() and kept.stat().st_mtime_ns >= results_file.stat().st_mtime_ns:
        accuracy = json.loads(kept.read_bytes())
        if accuracy.get("version") == _VERSION:
            return {**accuracy, "ious": dict(accuracy["ious"])}
    accuracy = {"metrics": {}, "ious": {}}
    if detections_file.exists():
        accuracy = evaluate_detections(data, json.loads(detections_file.read_bytes()))
    for task, metrics in json.loads(results_file.read_bytes()).items():
        if task not in TASKS:  # those of classes have names such as "IoU-person"
            accuracy["metrics"][task] = {k: v for k, v in metrics.items() if "-" not in k}
    with atomic_write(kept) as file:
        pairs = list(accuracy["ious"].items())  # JSON has string keys only
        file.write(json.dumps({**accuracy, "ious": pairs, "version": _VERSION}).encode())
    return accuracy


def evaluate_detections(data: TestSet, detections: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """All of COCO's numbers for detections in COCO's format.

    Returns:
        Per task: "metrics" in percent, "per_class" (see ``class_metrics``) and "pr_curves" (see
        ``precision_recall``). Also "ious" per image id (see ``object_ious``), "confusion" (see
        ``confusion_matrix``) and "errors" (see ``error_costs``).
    """
    found: dict[str, Any] = {"metrics": {}, "per_class": {}, "pr_curves": {}}
    for task in TASKS:
        evaluation = evaluate_coco(data.coco, detections, task)
        percent = [None if x < 0 else 100 * float(x) for x in evaluation.stats]
        found["metrics"][task] = dict(zip(METRICS, percent))
        names = [data.category_names[c] for c in evaluation.params.catIds]
        found["per_class"][task] = class_metrics(evaluation, names)
        found["pr_curves"][task] = precision_recall(evaluation, names)
    by_image = _by_image(detections)
    found["ious"] = {i: object_ious(data, i, by_image[i]) for i in data.file_names}
    found["confusion"] = confusion_matrix(data, by_image)
    found["errors"] = error_costs(data.coco, detections)
    return found


def main_score(accuracy: Mapping[str, Any]) -> float | None:
    """What decides between learning rates, in percent: AP of masks, else of boxes, else mIoU."""
    metrics = accuracy["metrics"]
    known = (metrics.get(task, {}).get(key) for task, key in MAIN_METRICS.items())
    return next((x for x in known if x is not None), None)


def class_metrics(
    evaluation: COCOeval, class_names: Sequence[str]
) -> dict[str, dict[str, float | None]]:
    """AP, AP50, AR100 and the largest F1 at IoU 0.5 in percent, and the score threshold of that F1.

    By class; all are None for a class without objects.
    """
    precision, scores = (evaluation.eval[key][..., 0, -1] for key in ("precision", "scores"))
    recall, recalls = evaluation.eval["recall"][..., 0, -1], evaluation.params.recThrs
    found: dict[str, dict[str, float | None]] = {}
    for k, name in enumerate(class_names):
        p = precision[:, :, k]
        f1 = 2 * p[0] * recalls / np.maximum(p[0] + recalls, 1e-12)
        best = f1.argmax()
        percent = {
            "AP": p.mean(),
            "AP50": p[0].mean(),
            "AR100": recall[:, k].mean(),
            "F1": f1[best],
        }
        numbers = {key: 100 * float(x) for key, x in percent.items()}
        numbers["threshold"] = float(scores[0, best, k])
        found[name] = numbers if (p > -1).all() else dict.fromkeys(numbers)  # type: ignore[assignment]
    return found


def precision_recall(evaluation: COCOeval, class_names: Sequence[str]) -> dict[str, list[float]]:
    """Precision at 101 recalls from 0 to 1, for objects of all sizes, by name of the curve.

    There are the mean over the classes at several IoU, and each class that has objects at IoU 0.5.
    """
    precision = evaluation.eval["precision"][:, :, :, 0, -1]  # (IoU, recall, class)
    present = [k for k in range(precision.shape[2]) if (precision[:, :, k] > -1).all()]
    curves = {}
    if present:
        mean = precision[:, :, present].mean(axis=2)
        curves = {"all classes, IoU 0.5": mean[0], "all classes, IoU 0.75": mean[5]}
        curves["all classes, mean over IoU 0.5 to 0.95"] = mean.mean(axis=0)
    curves |= {f"{class_names[k]}, IoU 0.5": precision[0, :, k] for k in present}
    return {name: np.round(curve, 4).tolist() for name, curve in curves.items()}


def object_ious(
    data: TestSet, image_id: int, detections: Iterable[Mapping[str, Any]]
) -> list[float]:
    """Per object (no crowd), the best mask IoU with a confident detection of its class."""
    objects = [x for x in data.objects(image_id) if not x.get("iscrowd")]
    confident = _confident(detections)
    iou = overlaps([x["segmentation"] for x in confident], objects)
    classes = [np.array([x["category_id"] for x in found]) for found in (confident, objects)]
    same = (classes[0][:, None] == classes[1]).reshape(iou.shape)
    return np.where(same, iou, 0.0).max(axis=0, initial=0.0).tolist()


def confusion_matrix(data: TestSet, by_image: Mapping[int, Sequence[Mapping]]) -> list[list[int]]:
    """(C + 1, C + 1) counts: rows are true classes and "background", columns predicted ones.

    Detections from ``SCORE_THRESHOLD`` are matched to objects by mask IoU whatever their class.
    Matches with crowds count nowhere.
    """
    index = {c: i for i, c in enumerate(data.category_names)}
    background = len(index)
    counts = np.zeros((background + 1, background + 1), dtype=int)
    for image_id in data.file_names:
        objects = data.objects(image_id)
        detections = _confident(by_image.get(image_id, ()))
        iou = overlaps([x["segmentation"] for x in detections], objects)
        matches = match(iou, [bool(x.get("iscrowd")) for x in objects])
        for x, m in zip(detections, matches):
            if m is None or not objects[m].get("iscrowd"):
                truth = background if m is None else index[objects[m]["category_id"]]
                counts[truth, index[x["category_id"]]] += 1
        for i, x in enumerate(objects):
            if i not in matches and not x.get("iscrowd"):
                counts[index[x["category_id"]], background] += 1
    return counts.tolist()


def disagreement(ious: Mapping[str, Sequence[float]]) -> float | None:
    """Mean over the objects of the span of the models' IoUs; None for one model or no objects."""
    values = np.array(list(ious.values()), dtype=float)
    if len(values) < 2 or values.size == 0:
        return None
    return float(np.ptp(values, axis=0).mean())


def choose_gallery(
    data: TestSet,
    ious: Mapping[str, Mapping[int, Sequence[float]]],
    detection_files: Mapping[str, Path],
    *,
    count: int,
) -> list[dict[str, Any]]:
    """The images on which models differ most, with what each of them found.

    Args:
        data: that the models were evaluated on.
        ious: by model and image, of ``evaluate_detections``.
        detection_files: by model.
        count: of images. With one model the worst images come first; those without objects last.
    """
    ranked = []
    for image_id in data.file_names if ious else ():
        of_models = {name: x[image_id] for name, x in ious.items()}
        span = disagreement(of_models)
        mean = float(np.mean(list(of_models.values()))) if any(of_models.values()) else 1.0
        ranked.append((-1.0 if span is None else span, -mean, image_id, of_models))
    ranked = sorted(ranked, key=lambda x: x[:2], reverse=True)[:count]
    chosen = {x[2] for x in ranked}
    found = {
        name: _by_image(x for x in json.loads(file.read_bytes()) if x["image_id"] in chosen)
        for name, file in detection_files.items()
    }
    return [
        {
            "file_name": str(Path(data.file_names[image_id]).resolve()),
            "image_id": image_id,
            "disagreement": None if span < 0 else span,
            "ious": {name: float(np.mean(x)) if x else None for name, x in of_models.items()},
            "ground_truth": [_drawn(data, x, x["rle"]) for x in data.objects(image_id)],
            "predictions": {
                name: [
                    _drawn(data, x, x["segmentation"])
                    for x in _confident(detections[image_id])[:_MOST_DETECTIONS]
                ]
                for name, detections in found.items()
            },
        }
        for span, _, image_id, of_models in ranked
    ]


def _drawn(data: TestSet, x: Mapping[str, Any], rle: Mapping[str, Any]) -> dict[str, Any]:
    """What the gallery shows of an object or a detection, as JSON has it."""
    counts = rle["counts"]
    counts = counts.decode() if isinstance(counts, bytes) else counts
    shown = {"class": data.category_names[x["category_id"]]}
    shown |= {"rle": {"size": list(rle["size"]), "counts": counts}}
    if "score" in x:
        return shown | {"score": round(mask_score(x), 4)}
    return shown | {"iscrowd": bool(x.get("iscrowd"))}


def summarize(values: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Numbers of several runs, by name, to mean and sample standard deviation.

    One run has no standard deviation. A number that a run lacks has no mean.
    """
    summary = {}
    for name in values[0] if values else ():
        numbers = [finite_or_none(x.get(name)) for x in values]
        complete = None not in numbers
        summary[name] = {
            "mean": float(np.mean(numbers)) if complete else None,  # type: ignore[arg-type]
            "std": float(np.std(numbers, ddof=1)) if complete and len(numbers) > 1 else None,  # type: ignore[arg-type]
            "values": numbers,
        }
    return summary


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a training's metrics.json; none if there is no such file."""
    path = folder / "metrics.json"
    lines = []
    for line in path.read_bytes().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):  # killed while it was written
            lines.append(json.loads(line))
    return lines


def training_curve(folder: Path) -> dict[str, Any] | None:
    """Losses and validations of a training, from its metrics.json.

    Returns:
        "iteration", "losses" by name, "validation" with its own "iteration" and the main metric of
        each task; None where nothing was trained.
    """
    lines = read_metrics(folder)
    steps = [x for x in lines if "total_loss" in x]
    # an evaluation has a line of its own, or shares one with the losses
    keys = [f"{task}/{metric}" for task, metric in MAIN_METRICS.items()]
    evaluated = [x for x in lines if any(key in x for key in keys)]
    if not steps:
        return None
    names = sorted({k for x in steps for k in x if k.startswith("loss_") or k == "total_loss"})
    validation: dict[str, list] = {"iteration": [x["iteration"] for x in evaluated]}
    for key in keys:
        if any(key in x for x in evaluated):
            validation[key] = [finite_or_none(x.get(key)) for x in evaluated]
    return {
        "iteration": [x["iteration"] for x in steps],
        "losses": {name: [finite_or_none(x.get(name)) for x in steps] for name in names},
        "validation": validation,
    }


def finite_or_none(value: Any) -> float | None:
    """JSON has no NaN."""
    return None if value is None or not np.isfinite(value) else float(value)


def _by_image(detections: Iterable[Mapping[str, Any]]) -> defaultdict[int, list]:
    result: defaultdict[int, list] = defaultdict(list)
    for x in detections:
        result[x["image_id"]].append(x)
    return result


def _confident(detections: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """From ``SCORE_THRESHOLD`` on, best first."""
    kept = [x for x in detections if mask_score(x) >= SCORE_THRESHOLD]
    return sorted(kept, key=mask_score, reverse=True)
