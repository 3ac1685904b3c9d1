"""Choosing the evaluators for a data set and a model."""

import os

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import (
    CityscapesInstanceEvaluator,
    CityscapesSemSegEvaluator,
    DatasetEvaluator,
    LVISEvaluator,
    PascalVOCDetectionEvaluator,
    SemSegEvaluator,
)
from detectron2.modeling import META_ARCH_REGISTRY, PanopticFPN

from solo_d2.errors import UserError
from solo_d2.modeling.segmentor import InstanceSegmentor

from .coco import InstanceEvaluator
from .label_maps import LabelMapEvaluator
from .panoptic import PanopticEvaluator
from .pictures import PredictionPictures


def build_evaluators(cfg: CfgNode, dataset_name: str, folder: str) -> list[DatasetEvaluator]:
    """The evaluators that Detectron2's train_net.py builds for the data set, then ours.

    A model whose ``best_metric`` is panoptic or semantic is evaluated so on any data set, a
    ``PanopticFPN`` on panoptic ones. ``PanopticEvaluator`` replaces Detectron2's, which needs
    ``panopticapi``.

    Args:
        cfg: config of the model.
        dataset_name: a registered set; without "evaluator_type" in its metadata it is "coco".
        folder: output folder for detections.

    Raises:
        UserError: the model has no output for the type of the data set.
    """
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type", "coco")
    architecture = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)
    if getattr(architecture, "best_metric", "").startswith("sem_seg/"):
        return [LabelMapEvaluator(dataset_name, folder)]
    evaluators: list[DatasetEvaluator] = []
    if kind in ("coco", "coco_panoptic_seg"):
        evaluators.append(InstanceEvaluator(dataset_name, output_dir=folder))
    elif kind == "lvis":
        evaluators.append(LVISEvaluator(dataset_name, output_dir=folder))
    elif kind == "cityscapes_instance":
        evaluators.append(CityscapesInstanceEvaluator(dataset_name))
    elif kind == "pascal_voc":
        evaluators.append(PascalVOCDetectionEvaluator(dataset_name))
    if not issubclass(architecture, InstanceSegmentor):
        if kind in ("sem_seg", "coco_panoptic_seg"):
            evaluators.append(SemSegEvaluator(dataset_name, output_dir=folder))
        if kind == "cityscapes_sem_seg":
            evaluators.append(CityscapesSemSegEvaluator(dataset_name))
    if not evaluators:
        raise UserError(
            f"{cfg.MODEL.META_ARCHITECTURE} cannot be evaluated on data set {dataset_name!r} of "
            f"evaluator_type {kind!r}"
        )
    is_panoptic = getattr(architecture, "best_metric", "").startswith("panoptic_seg/")
    if is_panoptic or (issubclass(architecture, PanopticFPN) and kind == "coco_panoptic_seg"):
        evaluators.append(PanopticEvaluator(dataset_name))
    if cfg.TEST.VIS_IMAGES > 0:
        pictures = PredictionPictures(
            dataset_name,
            os.path.join(cfg.OUTPUT_DIR, "vis"),
            num_images=cfg.TEST.VIS_IMAGES,
            score_threshold=cfg.TEST.VIS_SCORE_THRESH,
            max_iter=cfg.SOLVER.MAX_ITER,
        )
        evaluators.append(pictures)
    return evaluators
