"""YOLACT's prototypes as a picture."""

import numpy as np
import pytest
import torch
from detectron2.data import transforms as T
from PIL import Image
from tiny_models import YOLACT, tiny_model

from solo_d2.predictor import Predictor
from solo_d2.tools.predict.command import predict_sources
from solo_d2.tools.predict.inputs import find_sources
from solo_d2.tools.predict.prototypes import Prototypes, draw_prototypes


@pytest.fixture(scope="module")
def predictor():
    resize = T.ResizeShortestEdge(32, 96)
    return Predictor(tiny_model(YOLACT), resize=resize, input_format="RGB", names=["a", "b", "c"])


def test_each_image_gets_a_grid(predictor, tmp_path, save_image):
    save_image(tmp_path / "in" / "sub" / "photo.png", 40, 60)
    output = Prototypes(tmp_path / "out", 0.3, predictor)
    sources = find_sources([str(tmp_path / "in")], exclude=tmp_path / "out")
    assert predict_sources(predictor.predict, sources, [output]) == []
    (path,) = (tmp_path / "out").rglob("*.png")
    assert path.name == "photo.png.prototypes.png"
    # 3 rows and columns of tiles of 160 x 107, for the image and 8 prototypes
    assert Image.open(path).size == (3 * 164 + 4, 3 * 111 + 4)


def test_prototypes_are_those_that_masks_are_made_from(predictor):
    image = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    found = Prototypes("unused", 0.3, predictor).prototypes(image)
    model = predictor.model
    images = model.preprocess_image([{"image": predictor.network_input(image)}])
    with torch.no_grad():
        whole = model.dense(images.tensor).prototypes[0]
    assert found.shape == (8, 8, 12)  # of 32 x 48 pixels, at a stride of 4
    np.testing.assert_array_equal(found, whole.permute(2, 0, 1).numpy())


def test_a_prototype_is_scaled_to_its_maximum_and_an_empty_one_is_dark():
    image = np.full((4, 4, 3), 200, np.uint8)
    prototypes = np.zeros((2, 2, 2), np.float32)
    prototypes[0, 0, 0], prototypes[0, 0, 1] = 8.0, 4.0
    grid = draw_prototypes(image, prototypes)
    assert grid.shape == (2 * 164 + 4, 2 * 164 + 4, 3)
    assert (grid[80, 80] == 200).all()
    yellow, dark = grid[40, 208], grid[120, 208]
    assert yellow[:2].min() > 200 and yellow[2] < 60
    assert dark.max() < 90
    assert not np.array_equal(grid[40, 288], yellow) and not np.array_equal(grid[40, 288], dark)
    assert (grid[208:300, 40] == dark).all()  # the second prototype, in the next row
    assert (grid[208:, 208:] == 255).all()  # no tile
