"""Panoptic quality from ``panoptic_seg``, also for data that has annotations of instances only.

torchmetrics counts the matches, since ``panopticapi``, which Detectron2's evaluator needs, is not
on PyPI. The two differ in pixels that a prediction leaves unlabeled: torchmetrics takes them out of
the union and forgives the objects missed there, COCO does neither. To count as COCO does, such
pixels get a class of their own here.
"""

import logging
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.coco_panoptic import load_coco_panoptic_json
from detectron2.data.detection_utils import annotations_to_instances
from detectron2.evaluation import DatasetEvaluator
from detectron2.structures import BitMasks
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from PIL import Image
from tabulate import tabulate
from torch import Tensor

from solo_d2.errors import UserError

VOID = -1


class PanopticEvaluator(DatasetEvaluator):
    """PQ, SQ and RQ of all classes, things and stuff, under the names of Detectron2's evaluator.

    The ground truth of a record with "pan_seg_file_name" is that picture, and so is that of a set
    with "panoptic_json" in its metadata, such as Detectron2's "separated" ones. Otherwise it is
    painted from the annotations, smaller objects over larger ones; crowds are void, and the rest is
    the background.

    Void pixels of the ground truth do not count in a union, and predictions that lie in them by
    more than half are not counted. Averages exclude classes that neither occur nor are predicted.
    (panopticapi knows the class of a crowd: it forgives only predictions of that class, and keeps
    crowds in the union.)
    """

    def __init__(self, dataset_name: str):
        """
        Args:
            dataset_name: a registered set. If its metadata have no ``stuff_classes``, all stuff is
                one class, the background.

        Raises:
            UserError: torchmetrics is not installed.
        """
        # loaded first: many sets know their class names only then
        records = DatasetCatalog.get(dataset_name)
        metadata = MetadataCatalog.get(dataset_name)
        self._things = len(metadata.get("thing_classes") or ())
        self._stuff = len(metadata.get("stuff_classes") or ("background",))
        self._dataset_name = dataset_name
        if metadata.get("panoptic_json") and not any("pan_seg_file_name" in r for r in records):
            records = load_coco_panoptic_json(
                metadata.panoptic_json,
                metadata.image_root,
                metadata.panoptic_root,
                metadata.as_dict(),
            )
        self._records = {r["file_name"]: r for r in records}
        self.reset()

    def reset(self) -> None:
        try:  # imported here because it is slow and no other evaluation needs it
            from torchmetrics.detection import PanopticQuality
        except ImportError as error:
            raise UserError(
                f"panoptic quality needs torchmetrics ({error}): python -m pip install torchmetrics"
            ) from error

        classes = self._things + self._stuff
        self._metric = PanopticQuality(
            things={*range(self._things), classes},  # the last: unlabeled in the prediction
            stuffs=set(range(self._things, classes)),
            allow_unknown_preds_category=False,
            sync_on_compute=False,
        )

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        for x, output in zip(inputs, outputs):
            ids, segments = output["panoptic_seg"]
            stuff = max((s["category_id"] for s in segments if not s["isthing"]), default=0)
            if stuff >= max(2, self._stuff):  # one class may be counted from 1
                raise UserError(
                    f"the model predicts stuff class {stuff}, but data set {self._dataset_name!r} "
                    f"has {self._stuff} (see MODEL.ADAPTIS.NUM_STUFF)"
                )
            predicted = self._label(ids, segments, void=self._things + self._stuff)
            truth = self._label(*self.ground_truth(self._records[x["file_name"]]), void=VOID)
            # on the predictions' device, because sorting all pixels is slow
            self._metric.to(predicted.device)
            self._metric.update(predicted[None], truth.to(predicted.device)[None])

    def ground_truth(self, record: dict[str, Any]) -> tuple[Tensor, list[dict[str, Any]]]:
        """(H, W) ids and the segments that they stand for; ids without a segment are void."""
        if "pan_seg_file_name" in record:
            return _read_panoptic(record)
        size = record["height"], record["width"]
        return paint_ground_truth(record.get("annotations", ()), size)

    def _label(self, ids: Tensor, segments: Sequence[dict[str, Any]], void: int) -> Tensor:
        """(H, W, 2): class, things before stuff, and id."""
        classes = torch.full_like(ids, void, dtype=torch.int64)
        for segment in segments:
            category = segment["category_id"]
            if not segment["isthing"]:
                # of one class of stuff, the number does not matter: some models count from 1
                category = self._things + (category if self._stuff > 1 else 0)
            classes[ids == segment["id"]] = category
        # all void pixels are one region
        return torch.stack([classes, torch.where(classes == void, 0, ids.long())], dim=-1)

    def counts(self) -> Tensor:
        """(4, classes), things first, of this process; see ``panoptic_quality``."""
        metric = self._metric
        counts = torch.stack(
            [
                metric.iou_sum,
                metric.true_positives.double(),
                metric.false_positives.double(),
                metric.false_negatives.double(),
            ]
        ).cpu()
        # torchmetrics has things first too; the last of them is the class of unlabeled pixels
        return torch.cat([counts[:, : self._things], counts[:, self._things + 1 :]], dim=1)

    def evaluate(self) -> OrderedDict[str, dict[str, float]] | None:
        gathered = comm.gather(self.counts())
        if not comm.is_main_process():
            return None
        total = torch.stack(gathered).sum(0)
        results = panoptic_quality(total, self._things)
        rows = [
            [name, *(results[f"{q}{suffix}"] for q in ("PQ", "SQ", "RQ"))]
            for name, suffix in (("All", ""), ("Things", "_th"), ("Stuff", "_st"))
        ]
        table = tabulate(rows, ["", "PQ", "SQ", "RQ"], tablefmt="pipe", floatfmt=".2f")
        logging.getLogger(__name__).info(f"Panoptic quality, {self._dataset_name}:\n{table}")
        return OrderedDict(panoptic_seg=results)


def panoptic_quality(counts: Tensor, num_things: int) -> dict[str, float]:
    """PQ, SQ, RQ in percent: of all classes, of things ("PQ_th", ...) and of stuff ("PQ_st", ...).

    Args:
        counts: (4, classes), things first: the sum of the IoUs of matches, and the numbers of
            matches, of unmatched predictions and of unmatched true segments.
        num_things: number of thing classes.

    Returns:
        Averages over the classes that have any count; NaN if there are none.
    """
    iou, matched, extra, missed = counts.double()
    both = matched + (extra + missed) / 2
    quality = {
        "PQ": iou / both,
        "SQ": torch.where(matched > 0, iou / matched, 0.0),
        "RQ": matched / both,
    }
    parts = {"": slice(None), "_th": slice(num_things), "_st": slice(num_things, None)}
    return {
        f"{name}{suffix}": 100 * per_class[part][both[part] > 0].mean().item()
        for suffix, part in parts.items()
        for name, per_class in quality.items()
    }


def paint_ground_truth(
    annotations: Sequence[dict[str, Any]], size: tuple[int, int]
) -> tuple[Tensor, list[dict[str, Any]]]:
    """One label per pixel from masks that may overlap: smaller ones over larger ones.

    Args:
        annotations: in Detectron2's format; crowds are void, below all objects.
        size: height and width.

    Returns:
        ids: (H, W) int64; the rest, id 1, is the first class of stuff.
        segments: as in ``panoptic_seg``.
    """
    ids = torch.ones(size, dtype=torch.int64)
    crowds = [a for a in annotations if a.get("iscrowd", 0)]
    objects = [a for a in annotations if not a.get("iscrowd", 0)]
    for mask in _masks(crowds, size):
        ids[mask] = 0
    segments = [{"id": 1, "isthing": False, "category_id": 0}]
    masks = _masks(objects, size)
    areas = masks.flatten(1).sum(1)
    for index in torch.argsort(areas, descending=True, stable=True).tolist():
        category = objects[index]["category_id"]
        ids[masks[index]] = len(segments) + 1
        segments.append({"id": len(segments) + 1, "isthing": True, "category_id": category})
    return ids, segments


def _masks(annotations: Sequence[dict[str, Any]], size: tuple[int, int]) -> Tensor:
    """(N, H, W) bool"""
    if not annotations:
        return torch.zeros((0, *size), dtype=torch.bool)
    masks: BitMasks = annotations_to_instances(annotations, size, mask_format="bitmask").gt_masks
    return masks.tensor


def _read_panoptic(record: dict[str, Any]) -> tuple[Tensor, list[dict[str, Any]]]:
    with PathManager.open(record["pan_seg_file_name"], "rb") as file:
        rgb = np.asarray(Image.open(file).convert("RGB"), dtype=np.int64)
    ids = torch.from_numpy(rgb @ np.array([1, 256, 256**2]))
    return ids, [s for s in record["segments_info"] if not s.get("iscrowd", 0)]
