"""A small document, and catalogs that tests may change."""

import json

import numpy as np
import pycocotools.mask as mask_util
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

HEIGHT, WIDTH = 40, 60


@pytest.fixture
def catalogs(tmp_path, monkeypatch):
    """A separate cache for the test; the catalogs are restored afterwards."""
    monkeypatch.setenv("SOLO_D2_CACHE", str(tmp_path / "cache"))
    before = dict(DatasetCatalog.data), dict(MetadataCatalog.data)
    yield
    DatasetCatalog.data, MetadataCatalog.data = before


@pytest.fixture
def document():
    """Images with two objects and one; one RLE; category ids neither sorted nor contiguous."""
    mask = np.zeros((HEIGHT, WIDTH), np.uint8, order="F")
    mask[5:15, 20:40] = 1
    rle = mask_util.encode(mask)
    return {
        "images": [
            {"id": 7, "file_name": "b.png", "height": HEIGHT, "width": WIDTH},
            {"id": 3, "file_name": "a.png", "height": HEIGHT, "width": WIDTH},
        ],
        "annotations": [
            {
                "id": 11,
                "image_id": 7,
                "category_id": 9,
                "bbox": [2, 3, 10, 20],
                "area": 200,
                "iscrowd": 0,
                "segmentation": [[2, 3, 12, 3, 12, 23, 2, 23]],
            },
            {
                "id": 12,
                "image_id": 7,
                "category_id": 4,
                "bbox": [20, 5, 20, 10],
                "area": 200,
                "iscrowd": 0,
                "segmentation": {"size": [HEIGHT, WIDTH], "counts": rle["counts"].decode()},
            },
            {
                "id": 13,
                "image_id": 3,
                "category_id": 4,
                "bbox": [0, 0, 1, HEIGHT],
                "area": HEIGHT,
                "iscrowd": 1,
                "segmentation": {
                    "size": [HEIGHT, WIDTH],
                    "counts": [0, HEIGHT, HEIGHT * (WIDTH - 1)],
                },
            },
        ],
        "categories": [{"id": 9, "name": "cat"}, {"id": 4, "name": "dog"}],
    }


@pytest.fixture
def write(tmp_path):
    def write(document, name="set", images=True):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        json_file = tmp_path / f"{name}.json"
        json_file.write_text(document if isinstance(document, str) else json.dumps(document))
        if images:
            for image in document["images"]:
                Image.new("RGB", (WIDTH, HEIGHT)).save(folder / image["file_name"])
        return json_file, folder

    return write
