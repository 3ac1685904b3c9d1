"""The mapper: images without objects, crowds, boxes without masks, refused input."""

import copy
import re

import numpy as np
import pycocotools.mask as mask_util
import pytest
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, build_detection_train_loader
from detectron2.data import transforms as T
from PIL import Image
from torch.utils.data import Dataset

from solo_d2 import add_solo_d2_config
from solo_d2.config import load_config
from solo_d2.data import InstanceMapper
from solo_d2.errors import UserError

SQUARE = {"bbox": [4, 4, 8, 8], "bbox_mode": 1, "category_id": 0}
SQUARE["segmentation"] = [[4.0, 4.0, 12.0, 4.0, 12.0, 12.0, 4.0, 12.0]]


def build(*, architecture="SOLO", **settings):
    cfg = get_cfg()
    add_solo_d2_config(cfg)
    cfg.MODEL.META_ARCHITECTURE = architecture
    cfg.MODEL.MASK_ON = True
    cfg.MODEL.SOLO.NUM_CLASSES = 80
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
    # has no pixel, so it is dropped; the crowd flag must not move to another instance
    empty = {**SQUARE, "segmentation": [[4.0, 4.0, 4.0, 4.0, 4.0, 4.0]]}
    record = {"file_name": str(tmp_path / "a.png"), "annotations": [crowd, empty, dict(SQUARE)]}
    keeping = build(architecture="YOLACT")
    instances = keeping({**record, "height": 24, "width": 24, "image_id": 1})["instances"]
    assert instances.gt_crowd.tolist() == [False, True]
    assert instances.gt_classes.tolist() == [0, 1]
    assert instances.gt_boxes.tensor[1].tolist() == [4, 3, 12, 8]  # 24 pixels become 32


@pytest.mark.parametrize("architecture", ["GeneralizedRCNN", "SOLO", "YOLACT", "AdaptIS"])
def test_crowds_go_to_architectures_that_use_them(architecture):
    uses_them = architecture in ("YOLACT", "AdaptIS")
    assert build(architecture=architecture).keep_crowd == uses_them
    assert not build(architecture=architecture, MASK_FORMAT="polygon").keep_crowd


def record_of(tmp_path, *annotations, name="a.png"):
    Image.fromarray(np.zeros((24, 24, 3), np.uint8)).save(tmp_path / name)
    return {
        "file_name": str(tmp_path / name),
        "height": 24,
        "width": 24,
        "image_id": 1,
        "annotations": list(annotations),
    }


class Records(Dataset):
    """A data set that a user may register instead of a list."""

    def __init__(self, records):
        self.records = records

    def __len__(self):
        return len(self.records)

    def __getitem__(self, index):
        return self.records[index]


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
def test_detectron2s_loader_takes_it_for_a_torch_data_set_too(tmp_path, request):
    crowd = {**SQUARE, "iscrowd": 1}
    data_set = Records([record_of(tmp_path, dict(SQUARE), crowd)])
    DatasetCatalog.register("torch_data_set", lambda: data_set)
    request.addfinalizer(lambda: DatasetCatalog.remove("torch_data_set"))
    cfg = load_config(
        opts=["MODEL.META_ARCHITECTURE", "YOLACT", "MODEL.YOLACT.NUM_CLASSES", 80]
        + ["INPUT.MASK_FORMAT", "bitmask", "MODEL.MASK_ON", True]
        + ["INPUT.MIN_SIZE_TRAIN", (48,), "INPUT.RANDOM_FLIP", "none"]
        + ["DATASETS.TRAIN", ("torch_data_set",), "DATALOADER.NUM_WORKERS", 0]
        + ["SOLVER.IMS_PER_BATCH", 2, "DATALOADER.ASPECT_RATIO_GROUPING", False]
    )
    loader = build_detection_train_loader(cfg, mapper=InstanceMapper(cfg))
    batch = next(iter(loader))
    assert [tuple(x["image"].shape) for x in batch] == [(3, 48, 48)] * 2
    assert batch[0]["instances"].gt_crowd.tolist() == [False, True]


def test_boxes_are_enough_without_masks(tmp_path):
    cfg = load_config(opts=["INPUT.MIN_SIZE_TRAIN", (48,), "INPUT.RANDOM_FLIP", "none"])
    box_only = {"bbox": [4, 4, 8, 8], "bbox_mode": 1, "category_id": 3}
    instances = InstanceMapper(cfg)(record_of(tmp_path, box_only))["instances"]
    assert instances.gt_boxes.tensor.tolist() == [[8, 8, 24, 24]]
    assert not instances.has("gt_masks")


def test_a_record_is_left_as_it_is(mapper, tmp_path):
    record = record_of(tmp_path, dict(SQUARE))
    before = copy.deepcopy(record)
    mapper(record)
    assert record == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"category_id": 80}, "has the class 80, but the model has 80 classes, 0 to 79"),
        ({"category_id": -1}, "has the class -1, but the model has 80 classes"),
        ({"segmentation": None}, "no mask (segmentation); see MODEL.MASK_ON"),
    ],
)
def test_annotations_that_no_loss_may_see_are_refused_by_image(mapper, tmp_path, change, message):
    annotation = {k: v for k, v in {**SQUARE, **change}.items() if v is not None}
    with pytest.raises(UserError, match=re.escape(message)) as error:
        mapper(record_of(tmp_path, annotation))
    assert str(tmp_path / "a.png") in str(error.value)


def test_images_that_cannot_be_read_are_named(mapper, tmp_path):
    record = record_of(tmp_path)
    (tmp_path / "a.png").write_text("hello")
    with pytest.raises(UserError, match=f"image {tmp_path / 'a.png'}: not an image"):
        mapper(record)
    Image.new("RGB", (24, 25)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"got \(24, 25\), expect \(24, 24\)"):
        mapper(record)
    Image.new("RGB", (24, 24)).save(tmp_path / "a.png")
    (tmp_path / "stuff.png").write_text("hello")
    with pytest.raises(UserError, match=rf"image {tmp_path / 'stuff.png'}: .*identify"):
        mapper({**record, "sem_seg_file_name": str(tmp_path / "stuff.png")})


def test_errors_of_a_users_augmentation_stay_what_they_are(mapper, tmp_path):
    class Broken(T.Augmentation):
        def get_transform(self, image):
            raise ValueError("a bug")

    mapper.augmentations = T.AugmentationList([Broken()])
    with pytest.raises(ValueError, match="a bug"):
        mapper(record_of(tmp_path))


@pytest.mark.parametrize("is_train", [True, False])
def test_deep_images_are_scaled_in_training_and_evaluation(tmp_path, is_train):
    record = record_of(tmp_path)
    Image.fromarray(np.full((24, 24), 257 * 99, np.uint16)).save(tmp_path / "a.png")
    cfg = load_config(opts=["INPUT.MIN_SIZE_TRAIN", (24,), "INPUT.MIN_SIZE_TEST", 24])
    image = InstanceMapper(cfg, is_train=is_train)(record)["image"]
    assert image.shape == (3, 24, 24) and image.unique().tolist() == [99]


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (5, 1)])
def test_an_image_of_one_row_or_column_is_flipped(mapper, tmp_path, size):
    mapper.augmentations = T.AugmentationList([T.RandomFlip(prob=1.0)])
    pixels = np.arange(size[0] * size[1] * 3, dtype=np.uint8).reshape(*size, 3)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    record = {"file_name": str(tmp_path / "a.png"), "height": size[0], "width": size[1]}
    flipped = mapper(record)["image"].numpy()
    assert (flipped == pixels[:, ::-1, ::-1].transpose(2, 0, 1)).all()
