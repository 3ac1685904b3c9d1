"""From a record of a data set to a training example."""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import DatasetMapper
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import BoxMode

from .augmentation import build_augmentations

# Narrower or lower objects are no objects: Detectron2's own limit, in pixels.
_MIN_BOX_SIZE = 1e-5


class InstanceMapper(DatasetMapper):
    """Detectron2's mapper that can keep crowds and crop images without objects.

    There the original takes boxes from masks that do not exist. Augmentations may ask for "boxes"
    (N, 4), x1 y1 x2 y2 in pixels, and "is_crowd" (N,) bool of the annotations.
    """

    @configurable
    def __init__(
        self,
        is_train: bool,
        *,
        keep_crowd: bool = False,
        min_box_size: float = 0.0,
        reject_emptied: bool = False,
        **options: Any,
    ):
        """
        Args:
            is_train: see ``DatasetMapper``, as for the other options.
            keep_crowd: give crowd regions too, behind the objects; a field ``gt_crowd`` (N,) bool
                of the instances tells them.
            min_box_size: pixels; what is not both wider and higher after augmentation leaves.
            reject_emptied: give None where augmentation left nothing of an image's objects; the
                loader then takes another image.

        Raises:
            ValueError: crowds are to be kept as polygons; COCO has them as RLE.
        """
        super().__init__(is_train, **options)
        if keep_crowd and self.instance_mask_format != "bitmask":
            raise ValueError(
                'INPUT.KEEP_CROWD needs INPUT.MASK_FORMAT: "bitmask"; crowds are no polygons'
            )
        self.keep_crowd = keep_crowd
        self.min_box_size = max(min_box_size, _MIN_BOX_SIZE)
        self.reject_emptied = reject_emptied

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        if is_train and cfg.INPUT.KEEP_CROWD:
            architecture = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)
            if not getattr(architecture, "separates_crowds", False):
                raise ValueError(
                    f"INPUT.KEEP_CROWD: {cfg.MODEL.META_ARCHITECTURE} would take crowds for objects"
                )
        options = super().from_config(cfg, is_train)
        ssd = cfg.INPUT.SSD if is_train and cfg.INPUT.AUGMENTATION == "ssd" else None
        if ssd and ssd.CROP and ssd.TIGHT_BOXES:
            options["recompute_boxes"] = cfg.MODEL.MASK_ON
        return {
            **options,
            "augmentations": build_augmentations(cfg, is_train),
            "keep_crowd": cfg.INPUT.KEEP_CROWD,
            "min_box_size": ssd.MIN_BOX_SIZE if ssd else 0.0,
            "reject_emptied": ssd is not None,
        }

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any] | None:
        """A record to the model's input; None rejects it, see ``reject_emptied``."""
        annotations = self._kept(dataset_dict.get("annotations", ()))
        boxes = np.array(
            [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in annotations]
        ).reshape(-1, 4)
        is_crowd = np.array([bool(a.get("iscrowd", 0)) for a in annotations], dtype=bool)

        def augment(augmented: T.AugInput) -> T.TransformList:
            augmented.boxes, augmented.is_crowd = boxes, is_crowd
            return self.augmentations(augmented)

        # Detectron2's mapper gives its augmentations nothing but pixels
        mapper = copy.copy(self)
        mapper.augmentations = augment
        example = DatasetMapper.__call__(mapper, dataset_dict)
        if self.reject_emptied and not is_crowd.all() and not self._has_objects(example):
            return None
        return example

    def _kept(self, annotations: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Objects, and behind them the crowds, if these are kept."""
        objects = [a for a in annotations if not a.get("iscrowd", 0)]
        crowds = [a for a in annotations if a.get("iscrowd", 0)]
        return [*objects, *crowds] if self.keep_crowd else objects

    def _has_objects(self, example: dict[str, Any]) -> bool:
        instances = example["instances"]
        return len(instances) > (int(instances.gt_crowd.sum()) if self.keep_crowd else 0)

    def _transform_annotations(
        self, dataset_dict: dict[str, Any], transforms: Any, image_shape: tuple[int, int]
    ) -> None:
        kept = self._kept(dataset_dict.pop("annotations"))
        objects = sum(not a.get("iscrowd", 0) for a in kept)
        for annotation in kept:
            if not self.use_instance_mask:
                annotation.pop("segmentation", None)
            if not self.use_keypoint:
                annotation.pop("keypoints", None)
        instances = utils.annotations_to_instances(
            [
                utils.transform_instance_annotations(
                    annotation,
                    transforms,
                    image_shape,
                    keypoint_hflip_indices=self.keypoint_hflip_indices,
                )
                for annotation in kept
            ],
            image_shape,
            mask_format=self.instance_mask_format,
        )
        if self.keep_crowd:
            instances.gt_crowd = torch.arange(len(kept)) >= objects
        # what an augmentation took out of the image by its box is gone, whatever its mask says
        instances = utils.filter_empty_instances(instances, by_mask=False)
        if self.recompute_boxes and instances.has("gt_masks"):
            instances.gt_boxes = instances.gt_masks.get_bounding_boxes()
        dataset_dict["instances"] = utils.filter_empty_instances(
            instances, box_threshold=self.min_box_size
        )
