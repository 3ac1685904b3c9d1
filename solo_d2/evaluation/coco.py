"""COCO tables and results.json."""

import json
import math
import os
from collections.abc import Mapping
from typing import Any

from detectron2.evaluation import COCOEvaluator
from tabulate import tabulate

from solo_d2.files import atomic_write

from .coco_eval import evaluate_coco

# The detections of the last evaluation, in the evaluator's folder.
RESULTS_FILE = "coco_instances_results.json"


class InstanceEvaluator(COCOEvaluator):
    """Detectron2's COCO evaluator, with support for mask scores and for empty predictions.

    If nothing is found although there are objects, AP is 0, where Detectron2 gives NaN. It uses
    faster-coco-eval if that is installed, and never the evaluation in Detectron2's compiled
    extension, whose numbers may differ.

    Instances may have ``mask_scores`` besides ``scores``. Then ``mask_scores`` rank masks and
    ``scores`` rank boxes; in the results file they are "mask_score" and "score".
    """

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, use_fast_impl=False, **options)

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        for x, output in zip(inputs, outputs):
            super().process([x], [output])
            if "instances" not in output:
                continue
            instances = output["instances"]
            if instances.has("pred_masks"):
                self._tasks = ("bbox", "segm")
            if instances.has("mask_scores"):
                results = self._predictions[-1]["instances"]
                for result, score in zip(results, instances.mask_scores.tolist()):
                    result["mask_score"] = score

    def _eval_predictions(self, predictions: list[dict], img_ids: list[int] | None = None) -> None:
        """Evaluate as Detectron2 does, but with ``evaluate_coco``; fills ``_results``."""
        results = [result for x in predictions for result in x["instances"]]
        tasks = self._tasks or self._tasks_from_predictions(results)
        if "keypoints" in tasks:
            super()._eval_predictions(predictions, img_ids)
            return
        to_contiguous = self._metadata.get("thing_dataset_id_to_contiguous_id")
        if to_contiguous is not None:
            ids = {contiguous: category for category, contiguous in to_contiguous.items()}
            for result in results:
                result["category_id"] = ids[result["category_id"]]
        if self._output_dir:
            with atomic_write(os.path.join(self._output_dir, RESULTS_FILE)) as file:
                file.write(json.dumps(results).encode())
        if not self._do_evaluation:
            self._logger.info("The data set has no annotations to evaluate with")
            return
        for task in sorted(tasks):
            evaluation = evaluate_coco(
                self._coco_api,
                results,
                task,
                max_dets=self._max_dets_per_image,
                image_ids=img_ids,
            )
            names = self._metadata.get("thing_classes")
            self._results[task] = self._derive_coco_results(evaluation, task, class_names=names)


def write_results(results: Mapping[str, Any], output_dir: str) -> str:
    """Write the results of ``Trainer.test`` to results.json; returns its path.

    Values that cannot be computed, such as AP of large objects if there are none, are null.
    """
    path = os.path.join(output_dir, "results.json")
    with atomic_write(path) as file:
        file.write(json.dumps(_plain(results), indent=1, allow_nan=False).encode())
    return path


def summary_lines(results: Mapping[str, Any]) -> list[str]:
    """The main metrics of the results of ``Trainer.test``, one line for each task."""
    return [
        f"{task}: " + "  ".join(f"{name} {_text(value)}" for name, value in metrics.items())
        for task, metrics in _main_metrics(results).items()
    ]


def results_table(results: Mapping[str, Any]) -> str:
    """The main metrics of the results of ``Trainer.test``, one row for each task."""
    rows = _main_metrics(results)
    names = list(dict.fromkeys(name for metrics in rows.values() for name in metrics))
    cells = [
        [task, *(_text(metrics.get(name)) for name in names)] for task, metrics in rows.items()
    ]
    return tabulate(cells, ["", *names], stralign="right", disable_numparse=True)


def _main_metrics(results: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Task, or "<data set>/<task>" for several sets -> metrics, without those of classes."""
    found: dict[str, dict[str, Any]] = {}
    for name, value in results.items():
        if any(isinstance(x, Mapping) for x in value.values()):
            found |= {f"{name}/{task}": x for task, x in _main_metrics(value).items()}
        else:
            found[name] = {metric: x for metric, x in value.items() if "-" not in metric}
    return found


def _text(value: Any) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:.1f}"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(x) for key, x in value.items()}
    number = float(value)
    return number if math.isfinite(number) else None
