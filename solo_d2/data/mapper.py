"""From a record of a data set to a training example."""

from typing import Any

from detectron2.data import DatasetMapper
from detectron2.data import detection_utils as utils


class InstanceMapper(DatasetMapper):
    """Detectron2's mapper, made safe for cropping an image that has no objects.

    There the original takes boxes from masks that do not exist.
    """

    def _transform_annotations(
        self, dataset_dict: dict[str, Any], transforms: Any, image_shape: tuple[int, int]
    ) -> None:
        if all(annotation.get("iscrowd", 0) for annotation in dataset_dict["annotations"]):
            del dataset_dict["annotations"]
            dataset_dict["instances"] = utils.annotations_to_instances([], image_shape)
        else:
            super()._transform_annotations(dataset_dict, transforms, image_shape)
