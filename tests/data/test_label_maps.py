"""Label maps: painted, read, written, and those of PASCAL VOC."""

import re

import numpy as np
import pycocotools.mask as mask_util
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from solo_d2.data.label_maps import (
    paint_label_map,
    read_label_map,
    record_label_map,
    write_label_map,
)


def annotation(category, x1, y1, x2, y2, **more):
    polygon = [float(v) for v in (x1, y1, x2, y1, x2, y2, x1, y2)]
    return {"category_id": category, "segmentation": [polygon], **more}


def rle(category, x1, y1, x2, y2, **more):
    mask = np.zeros((6, 8), np.uint8, order="F")
    mask[y1:y2, x1:x2] = 1
    return {"category_id": category, "segmentation": mask_util.encode(mask), **more}


def test_smaller_objects_cover_larger_ones_and_all_cover_crowds():
    label_map = paint_label_map(
        [annotation(2, 0, 0, 2, 2), rle(0, 0, 0, 4, 4), rle(1, 2, 2, 8, 6, iscrowd=1)], 6, 8
    )
    expected = np.zeros((6, 8), np.uint8)
    expected[2:6, 2:8] = 255
    expected[0:4, 0:4] = 1
    expected[0:2, 0:2] = 3
    assert np.array_equal(label_map, expected)
    assert not paint_label_map([], 6, 8).any()


def test_boxes_alone_cannot_be_painted():
    with pytest.raises(ValueError, match="no mask"):
        paint_label_map([{"category_id": 0, "bbox": [0, 0, 4, 4]}], 6, 8)


def test_files_are_indexed_and_have_the_colors_of_voc(tmp_path):
    label_map = np.arange(6, dtype=np.uint8).reshape(2, 3)
    write_label_map(tmp_path / "a.png", label_map)
    assert np.array_equal(read_label_map(tmp_path / "a.png"), label_map)
    colors = np.asarray(Image.open(tmp_path / "a.png").convert("RGB")).reshape(-1, 3)
    black, maroon, green, olive, navy, purple = map(tuple, colors.tolist())
    assert (black, maroon, green) == ((0, 0, 0), (128, 0, 0), (0, 128, 0))
    assert (olive, navy, purple) == ((128, 128, 0), (0, 0, 128), (128, 0, 128))
    Image.fromarray(label_map).save(tmp_path / "gray.png")
    assert np.array_equal(read_label_map(tmp_path / "gray.png"), label_map)


def test_a_file_that_is_no_label_map_is_named(tmp_path):
    Image.new("RGB", (3, 2)).save(tmp_path / "colors.png")
    with pytest.raises(ValueError, match=r"colors\.png: its mode is RGB"):
        read_label_map(tmp_path / "colors.png")
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(ValueError, match=r"text\.png"):
        read_label_map(tmp_path / "text.png")
    with pytest.raises(FileNotFoundError):
        read_label_map(tmp_path / "none.png")


def test_a_record_has_a_file_or_annotations(tmp_path):
    write_label_map(tmp_path / "a.png", np.full((6, 8), 7, np.uint8))
    size = {"height": 6, "width": 8}
    assert (record_label_map({"sem_seg_file_name": str(tmp_path / "a.png"), **size}) == 7).all()
    assert (record_label_map({"annotations": [rle(3, 0, 0, 8, 6)], **size}) == 4).all()
    with pytest.raises(ValueError, match="neither"):
        record_label_map(size)


@pytest.fixture
def voc(tmp_path, monkeypatch):
    """VOC2012 with one image per list, and nothing else of it."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    root = tmp_path / "VOC2012"
    lists = root / "ImageSets" / "Segmentation"
    for folder in (lists, root / "JPEGImages", root / "SegmentationClassAug"):
        folder.mkdir(parents=True)
    for name in ("train_aug", "train"):
        (lists / f"{name}.txt").write_text(f"{name}_1\n")
        Image.new("RGB", (8, 6)).save(root / "JPEGImages" / f"{name}_1.jpg")
    write_label_map(
        root / "SegmentationClassAug" / "train_aug_1.png", np.full((6, 8), 20, np.uint8)
    )
    return root


def test_voc_is_registered_with_its_lists(voc):
    (record,) = DatasetCatalog.get("voc_2012_sem_seg_train_aug")
    assert record["file_name"] == str(voc / "JPEGImages" / "train_aug_1.jpg")
    assert (record_label_map(record) == 20).all()
    metadata = MetadataCatalog.get("voc_2012_sem_seg_train_aug")
    assert len(metadata.thing_classes) == 20
    assert metadata.stuff_classes == ["background", *metadata.thing_classes]
    assert (metadata.evaluator_type, metadata.ignore_label) == ("sem_seg", 255)


def test_missing_files_of_voc_are_named(voc):
    missing = re.escape(str(voc / "SegmentationClass" / "train_1.png"))
    with pytest.raises(FileNotFoundError, match=f"1 of 1 .* missing: {missing}"):
        DatasetCatalog.get("voc_2012_sem_seg_train")
    with pytest.raises(FileNotFoundError, match=r"val\.txt.*DETECTRON2_DATASETS"):
        DatasetCatalog.get("voc_2012_sem_seg_val")
