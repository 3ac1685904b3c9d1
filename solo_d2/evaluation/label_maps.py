"""mIoU of label maps, also for data that has annotations of instances only."""

import os
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import SemSegEvaluator

from solo_d2.data.label_maps import UNLABELED, record_label_map, write_label_map


class LabelMapEvaluator(SemSegEvaluator):
    """Detectron2's evaluator of "sem_seg"; writes each label map as <image name>.png.

    The ground truth is painted from the annotations of a record, or else read from its label map.
    """

    def __init__(self, dataset_name: str, output_dir: str):
        """
        Args:
            dataset_name: a registered set. The classes are the background and its
                ``thing_classes``, or if it has none its ``stuff_classes``, the background first.
            output_dir: results are written to it, label maps to its folder label_maps.
        """
        self._records = {r["file_name"]: r for r in DatasetCatalog.get(dataset_name)}
        metadata = MetadataCatalog.get(dataset_name)
        truth = f"{dataset_name}_label_maps"
        if truth in DatasetCatalog:  # of an earlier evaluation
            DatasetCatalog.remove(truth)
            MetadataCatalog.remove(truth)
        # Detectron2 wants a file per image; here its name only finds the record
        pairs = [{"file_name": name, "sem_seg_file_name": name} for name in self._records]
        DatasetCatalog.register(truth, lambda: pairs)
        things = metadata.get("thing_classes")
        MetadataCatalog.get(truth).set(
            stuff_classes=["background", *things] if things else metadata.stuff_classes,
            ignore_label=UNLABELED,
        )
        super().__init__(
            truth,
            output_dir=output_dir,
            sem_seg_loading_fn=lambda name, dtype: record_label_map(self._records[name]).astype(
                dtype
            ),
        )

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        super().process(inputs, outputs)
        folder = Path(self._output_dir, "label_maps")
        os.makedirs(folder, exist_ok=True)
        for x, output in zip(inputs, outputs):
            label_map = output["sem_seg"].argmax(dim=0).byte().cpu().numpy()
            write_label_map(folder / f"{Path(x['file_name']).stem}.png", label_map)
