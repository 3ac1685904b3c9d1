"""What a run's detections are worth, its training curves, and how models differ image by image."""

import contextlib
import io
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from solo_d2.evaluation.coco_eval import evaluate_coco, mask_score
from solo_d2.evaluation.oracle import error_costs, match, overlaps
from solo_d2.files import atomic_write

TASKS = {"segm": "mask", "bbox": "box"}  # -> its name in the report
# In the order of ``COCOeval.stats``.
METRICS = "AP AP50 AP75 APs APm APl AR1 AR10 AR100 ARs ARm ARl".split()
# Title -> task and key; the first that a model has decides.
MAIN_METRICS = {"mask AP": ("segm", "AP"), "box AP": ("bbox", "AP"), "mIoU": ("sem_seg", "mIoU")}
# Detections that count as a model's answer, in the gallery and in the confusion matrix.
SCORE_THRESHOLD = 0.3
# The gallery draws at most this many detections per image; more would hide each other.
_MOST_DETECTIONS = 40
_VERSION = 4  # of what is ``kept``; raise it when the content changes


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


def kept(path: Path, key: Any, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What was computed before under the same key, as JSON has it, or else now."""
    text = json.dumps([_VERSION, key], sort_keys=True)
    if path.exists() and (found := json.loads(path.read_bytes())).get("key") == text:
        return found["value"]
    value = compute()
    with atomic_write(path) as file:
        file.write(json.dumps({"key": text, "value": value}).encode())
    return value


def load_accuracy(data: TestSet, detections_file: Path, results_file: Path) -> dict[str, Any]:
    """``evaluate_detections`` of a run, computed once and kept beside its results.

    "metrics" has what else is in results.json, too: those of label maps and of panoptic masks. A
    model that writes no detections has those alone.
    """

    def compute() -> dict[str, Any]:
        found: dict[str, Any] = {"metrics": {}, "ious": {}}
        if detections_file.exists():
            found = evaluate_detections(data, json.loads(detections_file.read_bytes()))
        for task, metrics in json.loads(results_file.read_bytes()).items():
            if task not in TASKS:  # those of classes have names such as "IoU-person"
                found["metrics"][task] = {k: v for k, v in metrics.items() if "-" not in k}
        return found

    time = results_file.stat().st_mtime_ns
    found = kept(results_file.with_name("accuracy.json"), time, compute)
    # JSON has string keys only
    return found | {"ious": dict(zip(data.file_names, found["ious"].values()))}


def evaluate_detections(data: TestSet, detections: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """All of COCO's numbers for detections in COCO's format.

    Returns:
        Per task: "metrics" in percent, "per_class" (see ``class_metrics``) and "pr_curves" (see
        ``precision_recall``). Also "ious" and "confusion" (see ``match_images``) and "errors" (see
        ``error_costs``).
    """
    found: dict[str, Any] = {"metrics": {}, "per_class": {}, "pr_curves": {}}
    for task in TASKS:
        evaluation = evaluate_coco(data.coco, detections, task)
        percent = [None if x < 0 else 100 * float(x) for x in evaluation.stats]
        found["metrics"][task] = dict(zip(METRICS, percent))
        names = [data.category_names[c] for c in evaluation.params.catIds]
        found["per_class"][task] = class_metrics(evaluation, names)
        found["pr_curves"][task] = precision_recall(evaluation, names)
    found["ious"], found["confusion"] = match_images(data, detections)
    found["errors"] = error_costs(data.coco, detections)
    return found


def main_score(accuracy: Mapping[str, Any]) -> float | None:
    """What decides between learning rates, in percent: AP of masks, else of boxes, else mIoU."""
    metrics = accuracy["metrics"]
    known = (metrics.get(task, {}).get(key) for task, key in MAIN_METRICS.values())
    return next((x for x in known if x is not None), None)


def class_metrics(
    evaluation: COCOeval, class_names: Sequence[str]
) -> dict[str, dict[str, float | None]]:
    """AP, AP50, AR100 and the largest F1 at IoU 0.5 in percent, and the score threshold of that F1.

    By class; all are None for a class without objects.
    """
    precision, scores = (evaluation.eval[key][..., 0, -1] for key in ("precision", "scores"))
    recall, recalls = evaluation.eval["recall"][..., 0, -1], evaluation.params.recThrs[:, None]
    f1 = 2 * precision[0] * recalls / np.maximum(precision[0] + recalls, 1e-12)
    numbers = {
        "AP": 100 * precision.mean(axis=(0, 1)),
        "AP50": 100 * precision[0].mean(axis=0),
        "AR100": 100 * recall.mean(axis=0),
        "F1": 100 * f1.max(axis=0),
        "threshold": scores[0, f1.argmax(axis=0), range(len(class_names))],
    }
    present = (precision > -1).all(axis=(0, 1))
    return {
        name: {key: float(x[k]) if present[k] else None for key, x in numbers.items()}
        for k, name in enumerate(class_names)
    }


def precision_recall(evaluation: COCOeval, class_names: Sequence[str]) -> dict[str, list[float]]:
    """Precision at 101 recalls from 0 to 1, for objects of all sizes, by name of the curve.

    There are the mean over the classes at several IoU, and each class that has objects at IoU 0.5.
    """
    precision = evaluation.eval["precision"][..., 0, -1]  # (IoU, recall, class)
    present = np.flatnonzero((precision > -1).all(axis=(0, 1))).tolist()
    curves = {}
    if present:
        mean = precision[:, :, present].mean(axis=2)
        curves = {"all classes, IoU 0.5": mean[0], "all classes, IoU 0.75": mean[5]}
        curves["all classes, mean over IoU 0.5 to 0.95"] = mean.mean(axis=0)
    curves |= {f"{class_names[k]}, IoU 0.5": precision[0, :, k] for k in present}
    return {name: np.round(curve, 4).tolist() for name, curve in curves.items()}


def match_images(
    data: TestSet, detections: Iterable[Mapping[str, Any]]
) -> tuple[dict[int, list[float]], list[list[int]]]:
    """How the confident detections overlap the objects.

    Returns:
        ious: by image id, for each object (no crowd) the best mask IoU with a detection of its
            class.
        confusion: (C + 1, C + 1) counts, where rows are true classes and "background" and columns
            predicted ones. Detections are matched to objects by mask IoU whatever their class.
            Matches with crowds count nowhere.
    """
    index = {c: i for i, c in enumerate(data.category_names)}
    background = len(index)
    counts = np.zeros((background + 1, background + 1), dtype=int)
    ious, by_image = {}, _confident(detections)
    for image_id in data.file_names:
        objects, found = data.objects(image_id), by_image[image_id]
        iou = overlaps([x["segmentation"] for x in found], objects)
        truth, answers = (
            np.array([index[x["category_id"]] for x in several], dtype=int)
            for several in (objects, found)
        )
        crowd = np.array([bool(x.get("iscrowd")) for x in objects], dtype=bool)
        of_class = np.where(answers[:, None] == truth, iou, 0.0)
        ious[image_id] = of_class.max(axis=0, initial=0.0)[~crowd].tolist()
        matches = match(iou, crowd)
        for answer, m in zip(answers, matches):
            if m is None or not crowd[m]:
                counts[background if m is None else truth[m], answer] += 1
        for i in np.flatnonzero(~crowd):
            counts[truth[i], background] += i not in matches
    return ious, counts.tolist()


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
    images = data.file_names if ious else ()
    of_models = {i: {name: x[i] for name, x in ious.items()} for i in images}
    spans = {i: disagreement(x) for i, x in of_models.items()}

    def rank(i: int) -> tuple[float, float]:
        values, span = list(of_models[i].values()), spans[i]
        return -1.0 if span is None else span, -float(np.mean(values)) if values[0] else -1.0

    chosen = sorted(of_models, key=rank, reverse=True)[:count]
    found = {n: _confident(json.loads(file.read_bytes())) for n, file in detection_files.items()}
    return [
        {
            "file_name": str(Path(data.file_names[i]).resolve()),
            "image_id": i,
            "disagreement": spans[i],
            "ious": {name: float(np.mean(x)) if x else None for name, x in of_models[i].items()},
            "ground_truth": [_drawn(data, x, x["rle"]) for x in data.objects(i)],
            "predictions": {
                name: [_drawn(data, x, x["segmentation"]) for x in by_image[i][:_MOST_DETECTIONS]]
                for name, by_image in found.items()
            },
        }
        for i in chosen
    ]


def _drawn(data: TestSet, x: Mapping[str, Any], rle: Mapping[str, Any]) -> dict[str, Any]:
    """What the gallery shows of an object or a detection, as JSON has it."""
    counts = rle["counts"] if isinstance(rle["counts"], str) else rle["counts"].decode()
    shown = {"class": data.category_names[x["category_id"]]}
    shown |= {"rle": {"size": list(rle["size"]), "counts": counts}}
    if "score" in x:
        return shown | {"score": round(mask_score(x), 4)}
    return shown | {"iscrowd": bool(x.get("iscrowd"))}


def summarize(values: Sequence[Any]) -> dict[str, Any]:
    """A number, or a dict of them, of several runs to "mean", sample "std" and "values".

    One run has no standard deviation. A number that a run lacks has no mean.
    """
    first = values[0] if values else {}
    if isinstance(first, Mapping):
        return {name: summarize([x.get(name) for x in values]) for name in first}
    numbers = [finite_or_none(x) for x in values]
    complete = None not in numbers
    return {
        "mean": float(np.mean(numbers)) if complete else None,  # type: ignore[arg-type]
        "std": float(np.std(numbers, ddof=1)) if complete and numbers[1:] else None,  # type: ignore[arg-type]
        "values": numbers,
    }


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
    keys = ["/".join(metric) for metric in MAIN_METRICS.values()]
    evaluated = [x for x in lines if any(key in x for key in keys)]
    if not steps:
        return None

    def columns(rows: list[dict[str, Any]], wanted: Callable[[str], bool]) -> dict[str, list]:
        names = sorted({name for row in rows for name in row if wanted(name)})
        return {name: [finite_or_none(row.get(name)) for row in rows] for name in names}

    return {
        "iteration": [x["iteration"] for x in steps],
        "losses": columns(steps, lambda name: name == "total_loss" or name.startswith("loss_")),
        "validation": {"iteration": [x["iteration"] for x in evaluated]}
        | columns(evaluated, keys.__contains__),
    }


def finite_or_none(value: Any) -> float | None:
    """JSON has no NaN."""
    return None if value is None or not np.isfinite(value) else float(value)


def _confident(detections: Iterable[Mapping[str, Any]]) -> defaultdict[int, list]:
    """By image those from ``SCORE_THRESHOLD`` on, best first."""
    by_image: defaultdict[int, list] = defaultdict(list)
    for x in sorted(detections, key=mask_score, reverse=True):
        if mask_score(x) >= SCORE_THRESHOLD:
            by_image[x["image_id"]].append(x)
    return by_image
