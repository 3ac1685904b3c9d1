"""Images without objects pass the mapper, also when they are cropped."""

import numpy as np
import pytest
from detectron2.config import get_cfg
from PIL import Image

from solo_d2.data.mapper import InstanceMapper

SQUARE = {"bbox": [4, 4, 8, 8], "bbox_mode": 1, "category_id": 0}
SQUARE["segmentation"] = [[4.0, 4.0, 12.0, 4.0, 12.0, 12.0, 4.0, 12.0]]


@pytest.fixture
def mapper():
    cfg = get_cfg()
    cfg.MODEL.MASK_ON = True
    cfg.INPUT.MASK_FORMAT = "bitmask"
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.RANDOM_FLIP = (32,), "none"
    cfg.INPUT.CROP.ENABLED, cfg.INPUT.CROP.TYPE = True, "absolute"
    cfg.INPUT.CROP.SIZE = [24, 24]
    return InstanceMapper(cfg, is_train=True)


@pytest.mark.parametrize("annotations", [[], [{**SQUARE, "iscrowd": 1}]], ids=["none", "crowd"])
def test_a_cropped_image_without_objects_gives_no_instances(mapper, tmp_path, annotations):
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(tmp_path / "a.png")
    record = {"file_name": str(tmp_path / "a.png"), "annotations": annotations}
    example = mapper({**record, "height": 40, "width": 40, "image_id": 1})
    assert len(example["instances"]) == 0
    assert example["instances"].image_size == tuple(example["image"].shape[1:])


def test_objects_keep_their_masks_and_get_tight_boxes(mapper, tmp_path):
    Image.fromarray(np.zeros((24, 24, 3), np.uint8)).save(tmp_path / "a.png")
    record = {"file_name": str(tmp_path / "a.png"), "annotations": [dict(SQUARE)]}
    instances = mapper({**record, "height": 24, "width": 24, "image_id": 1})["instances"]
    assert instances.gt_boxes.tensor.tolist() == [[5, 5, 16, 16]]
    assert instances.gt_masks.tensor.sum() == 11 * 11
