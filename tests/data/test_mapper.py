"""Images without objects pass the mapper, also when they are cropped."""

import numpy as np
import pycocotools.mask as mask_util
import pytest
from detectron2.config import get_cfg
from PIL import Image

from solo_d2 import add_solo_d2_config
from solo_d2.data.mapper import InstanceMapper

SQUARE = {"bbox": [4, 4, 8, 8], "bbox_mode": 1, "category_id": 0}
SQUARE["segmentation"] = [[4.0, 4.0, 12.0, 4.0, 12.0, 12.0, 4.0, 12.0]]


def build(*, architecture="SOLO", **settings):
    cfg = get_cfg()
    add_solo_d2_config(cfg)
    cfg.MODEL.META_ARCHITECTURE = architecture
    cfg.MODEL.MASK_ON = True
    cfg.INPUT.MASK_FORMAT = "bitmask"
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.RANDOM_FLIP = (32,), "none"
    cfg.INPUT.CROP.ENABLED, cfg.INPUT.CROP.TYPE = True, "absolute"
    cfg.INPUT.CROP.SIZE = [24, 24]
    for key, value in settings.items():
        cfg.INPUT[key] = value
    return InstanceMapper(cfg, is_train=True)


@pytest.fixture
def mapper():
    return build()


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


def test_crowds_are_kept_behind_the_objects_and_marked(tmp_path):
    Image.fromarray(np.zeros((24, 24, 3), np.uint8)).save(tmp_path / "a.png")
    region = np.zeros((24, 24), np.uint8, order="F")
    region[2:6, 3:9] = 1
    crowd = {"bbox": [3, 2, 6, 4], "bbox_mode": 1, "category_id": 1, "iscrowd": 1}
    crowd["segmentation"] = mask_util.encode(region)
    # has no pixel, so it leaves; the mark of the crowd must not move to another
    empty = {**SQUARE, "segmentation": [[4.0, 4.0, 4.0, 4.0, 4.0, 4.0]]}
    record = {"file_name": str(tmp_path / "a.png"), "annotations": [crowd, empty, dict(SQUARE)]}
    keeping = build(KEEP_CROWD=True)
    instances = keeping({**record, "height": 24, "width": 24, "image_id": 1})["instances"]
    assert instances.gt_crowd.tolist() == [False, True]
    assert instances.gt_classes.tolist() == [0, 1]
    assert instances.gt_boxes.tensor[1].tolist() == [4, 3, 12, 8]  # 24 pixels become 32


def test_crowds_need_bitmasks():
    with pytest.raises(ValueError, match="INPUT.KEEP_CROWD"):
        build(KEEP_CROWD=True, MASK_FORMAT="polygon")


def test_crowds_are_not_given_to_models_that_would_take_them_for_objects():
    with pytest.raises(ValueError, match="GeneralizedRCNN would take crowds"):
        build(architecture="GeneralizedRCNN", KEEP_CROWD=True)
