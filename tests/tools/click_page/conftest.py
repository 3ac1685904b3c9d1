"""A folder of images, and the page's parts with a stand-in for the model."""

from types import SimpleNamespace

import pytest
from colored_boxes import SameColor, picture, predict
from PIL import Image

from solo_d2.tools.click_page import segmenter as module
from solo_d2.tools.click_page.annotations import AnnotationFile
from solo_d2.tools.click_page.segmenter import Segmenter
from solo_d2.tools.click_page.server import App


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    (folder / "more").mkdir(parents=True)
    Image.fromarray(picture()).save(folder / "one.png")
    Image.fromarray(picture()[:, ::-1]).save(folder / "more" / "zwei & ü.png")
    return folder


@pytest.fixture
def segmenter(monkeypatch):
    monkeypatch.setattr(module, "AdaptISPredictor", SameColor)
    monkeypatch.setattr(SameColor, "embedded", 0)
    return Segmenter(
        SimpleNamespace(
            model=None,
            takes_points=True,
            resize=None,
            input_format="RGB",
            max_pixels=0,
            names=["rod", "disc"],
            predict=predict,
        )
    )


@pytest.fixture
def app(images, segmenter):
    file = AnnotationFile(images / "annotations.json", images, {"rod": 1, "disc": 2})
    return App(images, segmenter, file)
