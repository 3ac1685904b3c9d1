"""What a run's detections are worth, and how models differ image by image."""

import contextlib
import io
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
from detectron2.data import DatasetCatalog, MetadataCatalog
from pycocotools.coco import COCO

from solo_d2.data.annotations import to_rle
from solo_d2.evaluation.coco_eval import evaluate_coco, mask_score
from solo_d2.files import atomic_write

from .curves import number, precision_recall

TASKS = ("segm", "bbox")
# In the order of ``COCOeval.stats``.
METRICS = (
    *("AP", "AP50", "AP75", "APs", "APm", "APl"),
    *("AR1", "AR10", "AR100", "ARs", "ARm", "ARl"),
)
# Detections that count as a model's answer, in the gallery's first view and in disagreement.
SCORE_THRESHOLD = 0.3
# Those that the gallery can show at all.
_LOWEST_SCORE, _MOST_DETECTIONS = 0.05, 100


class TestSet:
    """A registered data set, with its annotations as COCO has them."""

    def __init__(self, name: str):
        metadata = MetadataCatalog.get(name)
        self.name = name
        self.class_names: list[str] = list(metadata.thing_classes)
        to_contiguous = metadata.get("thing_dataset_id_to_contiguous_id") or {
            i: i for i in range(len(self.class_names))
        }
        names = {category: self.class_names[i] for category, i in to_contiguous.items()}
        self.category_names: dict[int, str] = names
        # loading the records may draw or fetch the files
        self.file_names = {x["image_id"]: x["file_name"] for x in DatasetCatalog.get(name)}
        with contextlib.redirect_stdout(io.StringIO()):
            self.coco = COCO(metadata.json_file)

    @property
    def image_ids(self) -> list[int]:
        return list(self.file_names)

    def wrong_detection(self) -> dict[str, Any]:
        """An empty mask, in COCO's format."""
        image = self.coco.imgs[self.image_ids[0]]
        mask = np.zeros((image["height"], image["width"]), np.uint8, order="F")
        found = {"image_id": image["id"], "category_id": min(self.category_names), "score": 0.0}
        return {**found, "bbox": [0.0, 0.0, 0.0, 0.0], "segmentation": mask_util.encode(mask)}

    def objects(self, image_id: int) -> list[dict[str, Any]]:
        """Annotations with "rle", their masks; crowds come last."""
        image = self.coco.imgs[image_id]
        found = []
        for x in sorted(self.coco.imgToAnns[image_id], key=lambda x: x.get("iscrowd", 0)):
            rle = to_rle(x["segmentation"], image["height"], image["width"])
            found.append({**x, "rle": rle})
        return found


def evaluate_detections(data: TestSet, detections: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """All of COCO's numbers for detections in COCO's format.

    Returns:
        "metrics" and "per_class", AP and AR in percent, and "pr_curves", each per task; and
        "ious": per image id, see ``object_ious``.
    """
    result: dict[str, Any] = {"metrics": {}, "per_class": {}, "pr_curves": {}}
    for task in TASKS:
        with contextlib.redirect_stdout(io.StringIO()):
            # COCO has no numbers for no detections; for one that is wrong everywhere it has
            evaluation = evaluate_coco(data.coco, detections or [data.wrong_detection()], task)
        assert evaluation is not None
        percent = [None if x < 0 else 100 * float(x) for x in evaluation.stats]
        result["metrics"][task] = dict(zip(METRICS, percent, strict=True))
        names = [data.category_names[c] for c in evaluation.params.catIds]
        result["per_class"][task] = {
            name: _mean_precision(evaluation.eval["precision"][:, :, k, 0, -1])
            for k, name in enumerate(names)
        }
        result["pr_curves"][task] = precision_recall(evaluation, names)
    by_image = group_by_image(detections)
    result["ious"] = {
        image_id: object_ious(data, image_id, by_image[image_id]) for image_id in data.image_ids
    }
    return result


def object_ious(
    data: TestSet, image_id: int, detections: Iterable[Mapping[str, Any]]
) -> list[float]:
    """For each object but crowds the best mask IoU with a detection of its class."""
    confident = [x for x in detections if mask_score(x) >= SCORE_THRESHOLD]
    best = []
    for x in data.objects(image_id):
        if x.get("iscrowd"):
            continue
        masks = [d["segmentation"] for d in confident if d["category_id"] == x["category_id"]]
        ious = mask_util.iou(masks, [x["rle"]], [0]) if masks else [[0.0]]
        best.append(round(float(np.max(ious)), 4))
    return best


def group_by_image(detections: Iterable[Mapping[str, Any]]) -> dict[int, list[Mapping[str, Any]]]:
    by_image: dict[int, list[Mapping[str, Any]]] = defaultdict(list)
    for x in detections:
        by_image[x["image_id"]].append(x)
    return by_image


def disagreement(ious: Mapping[str, Sequence[float]]) -> float | None:
    """Mean over the objects of an image of the span between the models' best IoUs.

    Args:
        ious: by model, for the same objects.

    Returns:
        In [0, 1]; None for one model or without objects.
    """
    values = np.array(list(ious.values()), dtype=float)
    if len(values) < 2 or values.size == 0:
        return None
    return float(np.ptp(values, axis=0).mean())


def make_gallery(
    data: TestSet,
    ious: Mapping[str, Mapping[int, Sequence[float]]],
    detection_files: Mapping[str, Path],
    *,
    count: int,
) -> list[dict[str, Any]]:
    """The images on which models differ most, with what each of them found.

    Args:
        ious: by model and image, of ``evaluate_detections``.
        detection_files: by model.
        count: of images; those without objects come last.
    """
    if not ious:
        return []
    ranked = []
    for image_id in data.image_ids:
        of_models = {name: x[image_id] for name, x in ious.items()}
        span = disagreement(of_models)
        mean = np.mean(list(of_models.values())) if any(of_models.values()) else 1.0
        # one model has nobody to disagree with: its worst images
        ranked.append((-1.0 if span is None else span, -mean, image_id, of_models))
    ranked = sorted(ranked, key=lambda x: x[:2], reverse=True)[:count]
    chosen = {x[2] for x in ranked}
    predictions: dict[str, dict[int, list]] = {}
    for name, file in detection_files.items():
        detections = json.loads(file.read_bytes())
        predictions[name] = group_by_image(x for x in detections if x["image_id"] in chosen)
    entries = []
    for span, _, image_id, of_models in ranked:
        image = data.coco.imgs[image_id]
        entries.append(
            {
                "file_name": str(Path(data.file_names[image_id]).resolve()),
                "image_id": image_id,
                "height": image["height"],
                "width": image["width"],
                "disagreement": None if span < 0 else span,
                "ious": {k: float(np.mean(v)) if v else None for k, v in of_models.items()},
                "ground_truth": [
                    {
                        "class": data.category_names[x["category_id"]],
                        "rle": _text(x["rle"]),
                        "crowd": bool(x.get("iscrowd")),
                    }
                    for x in data.objects(image_id)
                ],
                "predictions": {
                    name: _best(data, found.get(image_id, []))
                    for name, found in predictions.items()
                },
            }
        )
    return entries


def summarize(values: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Numbers of several runs, by name, to mean and sample standard deviation.

    One run has no standard deviation. A number that a run lacks has no mean.
    """
    summary = {}
    for name in values[0] if values else ():
        numbers = [number(x.get(name)) for x in values]
        known = [x for x in numbers if x is not None]
        complete = len(known) == len(numbers)
        summary[name] = {
            "mean": float(np.mean(known)) if complete else None,
            "std": float(np.std(known, ddof=1)) if complete and len(known) > 1 else None,
            "values": numbers,
        }
    return summary


def load_accuracy(data: TestSet, detections_file: Path, results_file: Path) -> dict[str, Any]:
    """``evaluate_detections`` of a run, computed once and then kept beside the detections."""
    kept = results_file.with_name("accuracy.json")
    if not kept.exists() or kept.stat().st_mtime_ns < results_file.stat().st_mtime_ns:
        accuracy = evaluate_detections(data, json.loads(detections_file.read_bytes()))
        with atomic_write(kept) as file:
            # json has text keys only
            pairs = list(accuracy["ious"].items())
            file.write(json.dumps({**accuracy, "ious": pairs}).encode())
    accuracy = json.loads(kept.read_bytes())
    return {**accuracy, "ious": dict(accuracy["ious"])}


def _mean_precision(precision: np.ndarray) -> float | None:
    valid = precision[precision > -1]
    return 100 * float(valid.mean()) if valid.size else None


def _best(data: TestSet, detections: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    kept = sorted(
        (x for x in detections if mask_score(x) >= _LOWEST_SCORE), key=mask_score, reverse=True
    )
    return [
        {
            "class": data.category_names[x["category_id"]],
            "score": round(mask_score(x), 4),
            "rle": x["segmentation"],
        }
        for x in kept[:_MOST_DETECTIONS]
    ]


def _text(rle: Mapping[str, Any]) -> dict[str, Any]:
    counts = rle["counts"]
    return {
        "size": list(rle["size"]),
        "counts": counts.decode() if isinstance(counts, bytes) else counts,
    }
