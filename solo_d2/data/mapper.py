"""From a record of a data set to a training example."""

from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import DatasetMapper
from detectron2.data import detection_utils as utils


class InstanceMapper(DatasetMapper):
    """Detectron2's mapper that can keep crowds and crop images without objects.

    There the original takes boxes from masks that do not exist.
    """

    @configurable
    def __init__(self, is_train: bool, *, keep_crowd: bool = False, **options: Any):
        """
        Args:
            is_train: see ``DatasetMapper``, as for the other options.
            keep_crowd: give crowd regions too, behind the objects; a field ``gt_crowd`` (N,) bool
                of the instances tells them.

        Raises:
            ValueError: crowds are to be kept as polygons; COCO has them as RLE.
        """
        super().__init__(is_train, **options)
        if keep_crowd and self.instance_mask_format != "bitmask":
            raise ValueError(
                'INPUT.KEEP_CROWD needs INPUT.MASK_FORMAT: "bitmask"; crowds are no polygons'
            )
        self.keep_crowd = keep_crowd

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        return {**super().from_config(cfg, is_train), "keep_crowd": cfg.INPUT.KEEP_CROWD}

    def _transform_annotations(
        self, dataset_dict: dict[str, Any], transforms: Any, image_shape: tuple[int, int]
    ) -> None:
        annotations = dataset_dict.pop("annotations")
        kept = [a for a in annotations if not a.get("iscrowd", 0)]
        objects = len(kept)
        if self.keep_crowd:
            kept += [a for a in annotations if a.get("iscrowd", 0)]
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
        if self.recompute_boxes and instances.has("gt_masks"):
            instances.gt_boxes = instances.gt_masks.get_bounding_boxes()
        dataset_dict["instances"] = utils.filter_empty_instances(instances)
