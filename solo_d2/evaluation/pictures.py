"""Pictures of predictions beside the ground truth, drawn after each evaluation."""

import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.structures import Instances
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage, has_event_storage
from PIL import Image

from solo_d2.drawing import comparison_grid
from solo_d2.files import atomic_write


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
            dataset_name: a registered set with "file_name" in its records.
            output_dir: pictures are written to iter_<last finished iteration>/ in it, or to
                eval_only/ if there is no training run.
            num_images: maximum number of images; they are spread evenly over the data set.
            score_threshold: predictions with lower scores are not drawn.
            max_iter: number of training iterations; a later evaluation counts for the last one.
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
                # select before the copy to the CPU: masks are large
                instances = instances[instances.scores >= self._score_threshold]
                self._predictions[x["file_name"]] = instances.to("cpu")

    def evaluate(self) -> None:
        gathered = comm.gather(self._predictions)
        if not comm.is_main_process():
            return
        predictions = {name: p for part in gathered for name, p in part.items()}
        try:
            self._draw(predictions)
        except Exception:  # a failed picture must not end the training run
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
        path = self._output_dir / folder / f"{self._dataset_name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            Image.fromarray(picture).save(file, format="PNG")
        logging.getLogger(__name__).info(f"Predictions beside ground truth: {path}")
