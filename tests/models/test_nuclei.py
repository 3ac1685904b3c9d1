"""The model in the package works offline, right after the installation."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import solo_d2
from solo_d2.checkpoint.find import MODELS
from solo_d2.evaluation.coco_eval import evaluate_coco
from solo_d2.tools.predict import main

FOLDER = MODELS / "nuclei"


def test_it_is_small_and_has_all_that_belongs_to_it():
    assert (FOLDER / "model.pth").stat().st_size <= 6e6
    stored = torch.load(FOLDER / "model.pth", weights_only=True)["model"].values()
    assert {x.dtype for x in stored if x.is_floating_point()} == {torch.float16}
    card = (FOLDER / "README.md").read_text()
    for part in ("| data |", "| schedule |", "mask AP", "solo-d2 train", "Not intended for"):
        assert part in card


def test_it_is_loaded_by_name_as_float32(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nuclei").mkdir()  # a folder of images hides nothing
    model = solo_d2.load("nuclei")
    assert model.names == ["nucleus"]
    assert {x.dtype for x in model.model.parameters()} == {torch.float32}


def test_the_command_takes_its_name(tmp_path, capsys):
    Image.fromarray(np.zeros((64, 80, 3), np.uint8)).save(tmp_path / "cells.png")
    words = ["--weights", "nuclei", "--output", str(tmp_path / "out"), str(tmp_path / "cells.png")]
    assert main(words) == 0
    assert Image.open(tmp_path / "out" / "cells.png").size == (80, 64)


@pytest.fixture
def few_images(data_dir):
    """(ground truth of every tenth validation image, their folder)"""
    from pycocotools.coco import COCO

    root = data_dir / "nuclei"
    document = json.loads((root / "annotations/instances_val.json").read_text())
    document["images"] = document["images"][::10]
    kept = {image["id"] for image in document["images"]}
    document["annotations"] = [x for x in document["annotations"] if x["image_id"] in kept]
    truth = COCO()
    truth.dataset = document
    truth.createIndex()
    return truth, root / "val"


def test_it_finds_nuclei_as_its_card_says(few_images):
    truth, folder = few_images
    model = solo_d2.load("nuclei")
    results = []
    for image in truth.dataset["images"]:
        results += model.predict(folder / image["file_name"]).to_coco(image["id"])
    assert 100 * evaluate_coco(truth, results, "segm").stats[0] > 35
