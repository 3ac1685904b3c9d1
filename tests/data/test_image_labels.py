"""The mapper of models that train on image labels."""

import re

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.data import transforms as T
from PIL import Image

from solo_d2.config import load_config
from solo_d2.data import ImageLabelMapper, InstanceMapper, build_mapper
from solo_d2.data.image_labels import RandomWindow, ResizeLongSide
from solo_d2.data.label_maps import write_label_map
from solo_d2.errors import UserError

HEIGHT, WIDTH = 24, 36
# of class 1, the left half
LEFT = {
    "bbox": [0, 0, 18, 24],
    "bbox_mode": 1,
    "category_id": 1,
    "segmentation": [[0.0, 0.0, 18.0, 0.0, 18.0, 24.0, 0.0, 24.0]],
}


EPS_SQUARE = {"AUGMENTATION": "eps", "CROP.SIZE": [64, 64]}


def config(**eps):
    cfg = load_config(opts=("MODEL.META_ARCHITECTURE", "EPS", "MODEL.EPS.NUM_CLASSES", 3))
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ()
    cfg.INPUT.FORMAT, cfg.INPUT.RANDOM_FLIP = "RGB", "none"
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TEST = (HEIGHT,), 0
    for key, value in eps.items():
        cfg.MODEL.EPS[key] = value
    return cfg


@pytest.fixture
def record(tmp_path):
    """An image whose red channel is its saliency: the right third."""
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    pixels[:, 24:, 0] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    (tmp_path / "saliency").mkdir()
    Image.fromarray(pixels[..., 0]).save(tmp_path / "saliency" / "a.png")
    return {
        "file_name": str(tmp_path / "a.png"),
        "image_id": 1,
        "height": HEIGHT,
        "width": WIDTH,
        "annotations": [LEFT, {**LEFT, "category_id": 2, "iscrowd": 1}],
    }


@pytest.fixture
def data_set(record):
    DatasetCatalog.register("one_image", lambda: [record])
    yield "one_image"
    DatasetCatalog.remove("one_image")


def test_the_architecture_chooses_the_mapper():
    cfg = config()
    assert type(build_mapper(cfg, is_train=True)) is ImageLabelMapper
    cfg.MODEL.META_ARCHITECTURE = "SOLOv2"
    assert type(build_mapper(cfg, is_train=False)) is InstanceMapper


def test_labels_are_the_classes_of_the_objects_and_not_of_crowds(record):
    for is_train in (True, False):
        example = ImageLabelMapper(config(), is_train=is_train)(record)
        assert example["image_labels"].tolist() == [0, 1, 0]
        assert "annotations" not in example and "instances" not in example
    assert "sem_seg" not in example  # only training needs it
    assert "annotations" in record
    example = ImageLabelMapper(config())({**record, "image_labels": [1, 0, 0]})
    assert example["image_labels"].tolist() == [1, 0, 0]


def test_labels_of_a_label_map_with_a_palette_are_its_indices(record, tmp_path):
    label_map = np.zeros((HEIGHT, WIDTH), np.uint8)
    label_map[3:9], label_map[9:12] = 3, 255
    write_label_map(tmp_path / "labels.png", label_map)
    del record["annotations"]
    record["sem_seg_file_name"] = str(tmp_path / "labels.png")
    example = ImageLabelMapper(config())(record)
    assert example["image_labels"].tolist() == [0, 0, 1]
    assert np.array_equal(example["sem_seg"].numpy(), label_map)


def test_without_saliency_maps_the_painted_label_map_stands_in(record):
    record["annotations"] = [LEFT]
    sem_seg = ImageLabelMapper(config())(record)["sem_seg"]
    assert (sem_seg[:, :18] == 2).all() and (sem_seg[:, 18:] == 0).all()
    example = ImageLabelMapper(config(SALIENCY_LOSS=False))(record)
    assert "sem_seg" not in example and "saliency" not in example


def test_the_saliency_map_follows_the_image(record, tmp_path):
    cfg = config(SALIENCY_FOLDER=str(tmp_path / "saliency"))
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.RANDOM_FLIP = (48,), "horizontal"
    np.random.seed(0)  # noqa: NPY002  Detectron2's augmentations use it
    flips = set()
    for _ in range(8):
        example = ImageLabelMapper(cfg)(record)
        red = example["image"][0] / 255
        assert example["saliency"].shape == (1, *red.shape) == (1, 48, 72)
        assert example["saliency"].dtype == torch.float32
        torch.testing.assert_close(example["saliency"][0], red)
        flips.add(bool(red[0, 0] > 0.5))
    assert flips == {True, False}
    assert "sem_seg" not in example


def test_the_published_augmentation_pads_with_the_mean_color_and_saliency_0(record, tmp_path):
    cfg = config(SALIENCY_FOLDER=str(tmp_path / "saliency"), LONG_SIDES=(20, 40))
    cfg.INPUT.AUGMENTATION, cfg.INPUT.CROP.SIZE = "eps", [64, 64]
    cfg.MODEL.PIXEL_MEAN = [1.5, 120.25, 99.0]
    example = ImageLabelMapper(cfg)(record)
    image, saliency = example["image"], example["saliency"][0]
    assert image.dtype == torch.float32 and image.shape == (3, 64, 64)
    assert saliency.shape == (64, 64) and saliency.max() > 0.95
    padding = (image == torch.tensor([1.5, 120.25, 99.0]).view(3, 1, 1)).all(dim=0)
    assert 64 * 64 - 40 * 27 <= padding.sum() <= 64 * 64 - 20 * 13
    assert (saliency[padding] == 0).all()
    # test images are left alone
    assert ImageLabelMapper(cfg, is_train=False)(record)["image"].dtype == torch.uint8


def test_a_window_lies_within_the_image_or_around_it():
    xs = set()
    for _ in range(200):
        window = RandomWindow(10, [0, 0, 0]).get_transform(np.zeros((8, 14, 3), np.uint8))
        assert 0 <= window.x0 <= 4 and -2 <= window.y0 <= 0
        xs.add((window.x0, window.y0))
    assert len(xs) == 5 * 3


def test_the_longer_side_is_drawn_from_the_range_and_both_are_bicubic():
    sizes = set()
    for _ in range(100):
        resize = ResizeLongSide(20, 23).get_transform(np.zeros((8, 16, 3), np.uint8))
        assert isinstance(resize, T.ResizeTransform)
        assert resize.interp == Image.Resampling.BICUBIC
        sizes.add((resize.new_h, resize.new_w))
    assert sizes == {(10, 20), (10, 21), (11, 22), (12, 23)}


def test_missing_saliency_maps_are_named_before_training(data_set, tmp_path):
    cfg = config(SALIENCY_FOLDER=str(tmp_path / "saliency"))
    cfg.DATASETS.TRAIN = (data_set,)
    ImageLabelMapper(cfg)
    (tmp_path / "saliency" / "a.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"SALIENCY_FOLDER.*1 of 1 .*saliency/a\.png"):
        ImageLabelMapper(cfg)
    ImageLabelMapper(cfg, is_train=False)  # needs none
    cfg.MODEL.EPS.SALIENCY_FOLDER = "nowhere"
    with pytest.raises(FileNotFoundError, match="SALIENCY_FOLDER: there is no nowhere nor"):
        ImageLabelMapper(cfg)


def test_the_saliency_folder_may_be_under_the_data_sets(record, tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    mapper = ImageLabelMapper(config(SALIENCY_FOLDER="saliency"))
    assert mapper(record)["saliency"].max() == 1


def test_what_cannot_be_used_is_named(record, tmp_path):
    mapper = ImageLabelMapper(config(SALIENCY_FOLDER=str(tmp_path / "saliency")))
    image = re.escape(record["file_name"])
    Image.new("L", (5, 4)).save(tmp_path / "saliency" / "a.png")
    with pytest.raises(UserError, match=f"image {image}: the saliency map .* is 5 x 4 .*36 x 24"):
        mapper(record)
    with pytest.raises(UserError, match=f"image {image}.* class 3"):
        mapper({**record, "annotations": [{**LEFT, "category_id": 3}]})
    with pytest.raises(UserError, match=f"image {image}: an annotation has no mask"):
        boxes = [{**LEFT, "segmentation": None}]
        del boxes[0]["segmentation"]
        ImageLabelMapper(config())({**record, "annotations": boxes})


@pytest.mark.parametrize(
    ("eps", "options", "message"),
    [
        ({"LONG_SIDES": (9, 3)}, {"AUGMENTATION": "eps"}, "INPUT.CROP.SIZE"),
        ({"LONG_SIDES": (9, 3)}, EPS_SQUARE, "MODEL.EPS.LONG_SIDES"),
        ({}, {**EPS_SQUARE, "FORMAT": "BGR"}, "'eps' needs RGB images, not BGR"),
        ({}, {"AUGMENTATION": "ssd"}, "INPUT.AUGMENTATION"),
    ],
)
def test_wrong_keys_are_refused(eps, options, message):
    cfg = config(**eps)
    for key, value in options.items():
        cfg.merge_from_list([f"INPUT.{key}", value])
    with pytest.raises(ValueError, match=message):
        ImageLabelMapper(cfg)
