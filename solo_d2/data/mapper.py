"""From a data set record to a training example."""

import copy
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import DatasetMapper, MetadataCatalog
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import BoxMode

from solo_d2.errors import UserError, one_line
from solo_d2.modeling.num_classes import get_value, num_classes_keys

from .augmentation import build_augmentations
from .cityscapes import panoptic_annotations
from .images import read_image

# INPUT.AUGMENTATION -> see ``reject_emptied``
_REJECT_EMPTIED = {"default": 0.0, "ssd": 1.0, "cityscapes": 0.95}


class InstanceMapper(DatasetMapper):
    """Detectron2's mapper that honors every key of INPUT.

    It can keep crowds, reads images with more than 8 bits, lets augmentations use "boxes" (those
    of the objects), and can crop images without objects, for which the original fails to compute
    boxes from masks. Pass it to ``build_detection_train_loader(cfg, mapper=...)``.
    """

    @configurable
    def __init__(
        self,
        *args: Any,
        keep_crowd: bool = False,
        reject_emptied: float = 0.0,
        panoptic_things: Collection[int] = (),
        num_classes: int | None = None,
        **kwargs: Any,
    ):
        """
        Args:
            args, kwargs: see ``DatasetMapper``.
            keep_crowd: also return crowd regions, after the objects; they are marked in a field
                ``gt_crowd`` (N,) bool of the instances. COCO stores them as RLE, so they need
                bitmasks. From a config: for architectures that use them (YOLACT, AdaptIS).
            reject_emptied: probability of returning None if augmentation removed all objects of an
                image; the loader then takes another image.
            num_classes: number of classes of the model; a class out of range is an error. None:
                not checked.
            panoptic_things: the classes of things in records that have a panoptic picture and no
                annotations, which are then made from it.

        Raises:
            ValueError: ``keep_crowd`` is set with polygon masks; COCO stores crowds as RLE.
        """
        super().__init__(*args, **kwargs)
        if keep_crowd and self.instance_mask_format != "bitmask":
            raise ValueError(
                'keep_crowd needs INPUT.MASK_FORMAT: "bitmask"; crowds are not polygons'
            )
        self.keep_crowd = keep_crowd
        self.reject_emptied = reject_emptied
        self.num_classes = num_classes
        self.panoptic_things = panoptic_things

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        options = super().from_config(cfg, is_train)
        kind = cfg.INPUT.AUGMENTATION if is_train else "default"
        num_classes = get_value(cfg, num_classes_keys(cfg)[0])
        architecture = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)
        uses_crowds = getattr(architecture, "uses_crowds", False)
        return {
            **options,
            "augmentations": build_augmentations(cfg, is_train),
            "recompute_boxes": options["recompute_boxes"]
            if kind == "default"
            else cfg.MODEL.MASK_ON,
            "keep_crowd": uses_crowds and cfg.INPUT.MASK_FORMAT == "bitmask",
            "reject_emptied": _REJECT_EMPTIED[kind],
            "num_classes": num_classes if num_classes > 0 else None,
            "panoptic_things": _panoptic_things(cfg.DATASETS.TRAIN),
        }

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any] | None:
        """From a record to the model's input; None rejects it, see ``reject_emptied``.

        Raises:
            UserError: the image or its annotations cannot be used; the message names the file.
        """
        example = copy.deepcopy(dataset_dict)
        with _naming(example):
            image = read_image(example["file_name"], self.image_format)
            utils.check_image_size(example, image)
        semantic = None
        if "sem_seg_file_name" in example:
            file = example.pop("sem_seg_file_name")
            with _naming({"file_name": file}):
                semantic = utils.read_image(file, "L").squeeze(2)
            # augmentations fill with 0, which stands for the label of ignored pixels, 255, here
            semantic = semantic + np.uint8(1)
        annotations = example.pop("annotations", None)
        if self.is_train and annotations is None and "pan_seg_file_name" in example:
            with _naming({"file_name": example["pan_seg_file_name"]}):
                annotations = panoptic_annotations(example, self.panoptic_things)
        objects = [a for a in annotations or () if not a.get("iscrowd", 0)]
        boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in objects]

        augmented = T.AugInput(image, boxes=np.array(boxes).reshape(-1, 4), sem_seg=semantic)
        transforms = self.augmentations(augmented)
        image_shape = augmented.image.shape[:2]
        # a copy: of one row or column, a flipped view counts as contiguous, which torch refuses
        pixels = augmented.image.transpose(2, 0, 1).copy()
        example["image"] = torch.as_tensor(pixels)
        if augmented.sem_seg is not None:
            labels = augmented.sem_seg - np.uint8(1)
            example["sem_seg"] = torch.as_tensor(labels.astype("long"))
        if self.proposal_topk is not None:
            utils.transform_proposals(
                example, image_shape, transforms, proposal_topk=self.proposal_topk
            )
        if not self.is_train or annotations is None:
            return example

        crowds = [a for a in annotations if a.get("iscrowd", 0)] if self.keep_crowd else []
        with _naming(example):
            instances = self._instances([*objects, *crowds], len(objects), transforms, image_shape)
        example["instances"] = instances
        found = len(instances) - (int(instances.gt_crowd.sum()) if self.keep_crowd else 0)
        if objects and not found and np.random.rand() < self.reject_emptied:  # noqa: NPY002
            return None
        return example

    def _instances(
        self,
        annotations: list[dict[str, Any]],
        objects: int,
        transforms: T.TransformList,
        image_shape: tuple[int, int],
    ) -> Any:
        """``Instances`` of the annotations that remain in the image.

        Args:
            annotations: objects, then crowds.
            objects: number of objects.
            transforms: from the file's pixels to the example's.
            image_shape: height and width of the example.
        """
        self._check(annotations)
        used = {"segmentation": self.use_instance_mask, "keypoints": self.use_keypoint}
        transformed = [
            utils.transform_instance_annotations(
                {key: value for key, value in annotation.items() if used.get(key, True)},
                transforms,
                image_shape,
                keypoint_hflip_indices=self.keypoint_hflip_indices,
            )
            for annotation in annotations
        ]
        instances = utils.annotations_to_instances(
            transformed, image_shape, mask_format=self.instance_mask_format
        )
        if self.keep_crowd:
            instances.gt_crowd = torch.arange(len(annotations)) >= objects
        # an object whose box an augmentation emptied is dropped, even if its mask has pixels left
        instances = utils.filter_empty_instances(instances, by_mask=False)
        if self.recompute_boxes and instances.has("gt_masks"):
            instances.gt_boxes = instances.gt_masks.get_bounding_boxes()
        return utils.filter_empty_instances(instances)

    def _check(self, annotations: list[dict[str, Any]]) -> None:
        for annotation in annotations:
            category = annotation["category_id"]
            if self.num_classes is not None and not 0 <= category < self.num_classes:
                raise ValueError(
                    f"an annotation has the class {category!r}, but the model has "
                    f"{self.num_classes} classes, 0 to {self.num_classes - 1}"
                )
            if self.use_instance_mask and "segmentation" not in annotation:
                raise ValueError("an annotation has no mask (segmentation); see MODEL.MASK_ON")


def _panoptic_things(datasets: Sequence[str]) -> Collection[int]:
    """Classes of things of the data sets, as their "segments_info" have them."""
    maps = [MetadataCatalog.get(x).get("thing_dataset_id_to_contiguous_id", {}) for x in datasets]
    return {thing for known in maps for thing in known.values()}


@contextmanager
def _naming(record: dict[str, Any]) -> Iterator[None]:
    """Make errors about the record's content name its file."""
    try:
        yield
    except (OSError, ValueError) as error:
        name = record.get("file_name", record.get("image_id"))
        raise UserError(f"image {name}: {one_line(error)}") from error
