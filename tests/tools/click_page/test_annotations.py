"""The file that the page writes: what it holds, what it leaves alone, and who accepts it."""

import json

import numpy as np
import pytest
from colored_boxes import BOXES, HEIGHT, WIDTH, box_mask
from detectron2.data import DatasetCatalog, MetadataCatalog

from solo_d2.data.coco import read_coco
from solo_d2.errors import UserError
from solo_d2.tools import check, train
from solo_d2.tools.click_page.annotations import AnnotationFile
from solo_d2.tools.click_page.segmenter import describe

SIZE = HEIGHT, WIDTH
CLASSES = {"rod": 1, "disc": 2}


def item(name, *box):
    return {"class": name, "counts": describe(box_mask(*box))["counts"]}


@pytest.fixture
def catalogs(tmp_path, monkeypatch):
    monkeypatch.setenv("SOLO_D2_CACHE", str(tmp_path / "cache"))
    before = dict(DatasetCatalog.data), dict(MetadataCatalog.data)
    yield
    DatasetCatalog.data, MetadataCatalog.data = before


def test_what_is_saved_is_read_back(images):
    file = AnnotationFile(images / "annotations.json", images, CLASSES)
    assert file.objects("one.png", SIZE) == [] and file.counts() == {}
    file.save("one.png", SIZE, [item("disc", *BOXES[0]), item("rod", *BOXES[1])])
    file.save("more/zwei & ü.png", SIZE, [])
    again = AnnotationFile(images / "annotations.json", images, CLASSES)
    assert again.counts() == {"one.png": 2, "more/zwei & ü.png": 0}
    assert again.objects("one.png", SIZE) == [
        {"id": 1, "class": "disc", **describe(box_mask(*BOXES[0]))},
        {"id": 2, "class": "rod", **describe(box_mask(*BOXES[1]))},
    ]
    again.save("one.png", SIZE, [item("rod", *BOXES[2])])
    assert [x["class"] for x in file.objects("one.png", SIZE)] == ["disc", "rod"]
    document = read_coco(images / "annotations.json", images).document
    assert [a["id"] for a in document["annotations"]] == [3]
    assert document["annotations"][0]["bbox"] == [10, 35, 10, 10]


POLYGON = {
    "id": 7,
    "image_id": 4,
    "category_id": 9,
    "segmentation": [[5, 5, 25, 5, 25, 20, 5, 20]],
    "bbox": [5, 5, 20, 15],
    "area": 300,
    "iscrowd": 0,
    "note": "by hand",
}
CROWD = POLYGON | {"id": 8, "iscrowd": 1}
BOX_ONLY = {k: v for k, v in POLYGON.items() if k != "segmentation"} | {"id": 9}


@pytest.fixture
def existing(images):
    """A file of another tool."""
    image = {"id": 4, "file_name": "./one.png", "height": HEIGHT, "width": WIDTH}
    other = {"id": 5, "file_name": "elsewhere.png", "height": 8, "width": 9}
    document = {
        "licenses": ["mine"],
        "images": [image, other],
        "annotations": [POLYGON, CROWD, BOX_ONLY],
        "categories": [{"id": 9, "name": "bar"}, {"id": 1, "name": "disc"}],
    }
    path = images / "existing.json"
    path.write_text(json.dumps(document))
    return path


def test_an_existing_file_is_continued(existing, images):
    file = AnnotationFile(existing, images, CLASSES)
    assert file.classes == ["bar", "disc", "rod"]
    (found,) = file.objects("one.png", SIZE)
    assert (found["id"], found["class"], found["area"]) == (7, "bar", 300)
    found["class"] = "rod"
    file.save("one.png", SIZE, [found, item("disc", *BOXES[1])])
    document = json.loads(existing.read_text())
    assert file.skipped.startswith("crowd regions") and document["licenses"] == ["mine"]
    assert [x["id"] for x in document["images"]] == [5, 4]
    *kept, polygon, new = document["annotations"]
    assert kept == [CROWD, BOX_ONLY]
    assert polygon == POLYGON | {"category_id": 10}
    assert (new["id"], new["category_id"], new["image_id"]) == (10, 1, 4)
    assert document["categories"][2:] == [{"id": 10, "name": "rod"}]


def test_a_changed_mask_replaces_its_polygon(existing, images):
    file = AnnotationFile(existing, images, CLASSES)
    file.save("one.png", SIZE, [item("bar", *BOXES[0])])
    document = json.loads(existing.read_text())
    assert {a["id"] for a in document["annotations"]} == {8, 9, 10}
    assert [c["name"] for c in document["categories"]] == ["bar", "disc"]  # no unused class


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (item("no such", *BOXES[0]), "no class 'no such'"),
        ({"class": "rod", "counts": [3, 4]}, "not that of an image of 80 x 60"),
        ({"class": "rod", "counts": [HEIGHT * WIDTH]}, "a mask is empty"),
        ({"class": "rod"}, "a mask"),
    ],
)
def test_invalid_objects_change_nothing(existing, images, entry, message):
    before = existing.read_bytes()
    file = AnnotationFile(existing, images, CLASSES)
    with pytest.raises(ValueError, match=message):
        file.save("one.png", SIZE, [item("disc", *BOXES[1]), entry])
    assert existing.read_bytes() == before and file.counts()["one.png"] == 1


def test_another_size_than_that_of_the_image_is_named(existing, images):
    with pytest.raises(UserError, match=r"one.png is 8 x 6, in .*existing.json it is 80 x 60"):
        AnnotationFile(existing, images, CLASSES).objects("one.png", (6, 8))


CONFIG = """
MODEL:
  META_ARCHITECTURE: "SOLOv2"
  BACKBONE: {NAME: "build_mobilenetv2_fpn_backbone"}
  MOBILENETV2: {WIDTH_MULT: 0.25, NORM: "BN"}
  FPN: {IN_FEATURES: ["res2", "res3", "res4", "res5"], OUT_CHANNELS: 32}
  SOLO: {NUM_CLASSES: -1, NUM_CONVS: 1, CONV_DIM: 32, NUM_GRIDS: [8, 8, 6, 6, 4]}
  SOLOV2: {MASK_DIM: 32, MASK_CONV_DIM: 32}
  MASK_ON: True
  WEIGHTS: ""
  DEVICE: "cpu"
INPUT: {MASK_FORMAT: "bitmask", MIN_SIZE_TRAIN: [60], MIN_SIZE_TEST: 60}
SOLVER: {IMS_PER_BATCH: 1, MAX_ITER: 1}
TEST: {VIS_IMAGES: 0}
DATALOADER: {NUM_WORKERS: 0}
VERSION: 2
"""


def test_the_check_finds_nothing_and_training_takes_the_file(images, tmp_path, catalogs, capsys):
    file = AnnotationFile(images / "annotations.json", images, CLASSES)
    for name in ("one.png", "more/zwei & ü.png"):
        file.save(name, SIZE, [item("disc", *BOXES[1]), item("rod", *BOXES[0])])
    (tmp_path / "config.yaml").write_text(CONFIG)
    data = ["--config-file", str(tmp_path / "config.yaml"), "--data"]
    data += 2 * [str(images / "annotations.json"), str(images)]
    assert check.main(data) == check.EXIT_CLEAN, capsys.readouterr().out
    assert train.main([*data, "OUTPUT_DIR", str(tmp_path / "run")]) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert np.isfinite(results["segm"]["AP"])
