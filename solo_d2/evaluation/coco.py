"""What an evaluation leaves: COCO tables, pictures, results.json."""

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator, DatasetEvaluator
from detectron2.structures import Instances
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage, has_event_storage
from PIL import Image

from solo_d2.drawing import comparison_grid
from solo_d2.files import atomic_write

from .coco_eval import evaluate_coco

# The detections of the last evaluation, in the folder of the evaluator.
RESULTS_FILE = "coco_instances_results.json"


class InstanceEvaluator(COCOEvaluator):
    """Detectron2's COCO evaluator that also gives a mask table when nothing is found.

    It asks the predictions which tasks there are; an untrained model may make none. It uses
    faster-coco-eval where that is installed, which changes no digit, and not the evaluation that
    is in Detectron2's compiled part, which may.

    Instances may have ``mask_scores`` besides ``scores``: these rank boxes, those masks. In the
    results file they are "mask_score" and "score".
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
        """What Detectron2 does, with ``evaluate_coco``; fills ``_results``."""
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


class PredictionPictures(DatasetEvaluator):
    """Draws predictions beside the ground truth for some images, the same ones each time."""

    def __init__(
        self,
        dataset_name: str,
        output_dir: str,
        *,
        num_images: int,
        score_threshold: float,
        max_iter: int,
    ):
        """
        Args:
            dataset_name: registered; has "file_name" in its records.
            output_dir: pictures are written to vis/iter_<last finished iteration>/ in it.
            num_images: at most; they are spread evenly over the data set.
            score_threshold: lower ones are not drawn.
            max_iter: of the training, after which an evaluation counts for its last iteration.
        """
        records = DatasetCatalog.get(dataset_name)
        chosen = np.linspace(0, len(records) - 1, min(num_images, len(records))).round()
        self._records = {records[int(i)]["file_name"]: records[int(i)] for i in chosen}
        self._dataset_name = dataset_name
        self._output_dir = Path(output_dir)
        self._score_threshold = score_threshold
        self._max_iter = max_iter
        self._predictions: dict[str, Instances] = {}

    def reset(self) -> None:
        self._predictions = {}

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        for x, output in zip(inputs, outputs):
            if x["file_name"] in self._records and "instances" in output:
                instances = output["instances"]
                # before they leave the device: masks are large
                instances = instances[instances.scores >= self._score_threshold]
                self._predictions[x["file_name"]] = instances.to("cpu")

    def evaluate(self) -> None:
        gathered = comm.gather(self._predictions)
        if not comm.is_main_process():
            return
        predictions = {name: p for part in gathered for name, p in part.items()}
        try:
            self._draw(predictions)
        except Exception:  # a picture is not worth a training
            logging.getLogger(__name__).exception(f"No pictures of {self._dataset_name}")

    def _draw(self, predictions: Mapping[str, Instances]) -> None:
        names = [name for name in self._records if name in predictions]
        if not names:
            return
        picture = comparison_grid(
            [self._records[name] for name in names],
            [predictions[name] for name in names],
            MetadataCatalog.get(self._dataset_name).get("thing_classes"),
            score_threshold=self._score_threshold,
        )
        folder = "eval_only"
        if has_event_storage():
            storage = get_event_storage()
            folder = f"iter_{min(storage.iter, self._max_iter - 1):07d}"
            storage.put_image(f"vis/{self._dataset_name}", picture.transpose(2, 0, 1))
        path = self._output_dir / "vis" / folder / f"{self._dataset_name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            Image.fromarray(picture).save(file, format="PNG")
        logging.getLogger(__name__).info(f"Predictions beside ground truth: {path}")


def write_results(results: Mapping[str, Any], output_dir: str) -> str:
    """Write what ``Trainer.test`` returned to results.json; returns its path."""
    path = os.path.join(output_dir, "results.json")
    with atomic_write(path) as file:
        file.write(json.dumps(results, indent=1, default=float).encode())
    return path
