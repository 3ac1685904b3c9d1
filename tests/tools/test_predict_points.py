"""predict --points: what lies under each point is drawn, and what cannot be is named."""

import json

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from PIL import Image

from solo_d2.checkpoint.checkpointer import Checkpointer
from solo_d2.config import load_config
from solo_d2.drawing import draw_points
from solo_d2.modeling import AdaptISPredictor
from solo_d2.tools import predict
from solo_d2.tools.predict import PointsPredictor, UnreadableError

TINY = """
VERSION: 2
MODEL:
  META_ARCHITECTURE: "AdaptIS"
  DEVICE: "cpu"
  WEIGHTS: ""
  BACKBONE: {NAME: "build_adaptis_unet_backbone"}
  UNET: {WIDTH: 4, LEVELS: 3}
  ADAPTIS: {HEAD: cityscapes, CONV_DIM: 8, SEMANTIC_DIM: 4}
  PIXEL_STD: [127.5, 127.5, 127.5]
DATASETS:
  TRAIN: ()
  TEST: ()
INPUT: {MIN_SIZE_TEST: 32, MAX_SIZE_TEST: 96, FORMAT: "RGB"}
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Folder with config.yaml, weights.pth and photo.png of 60 x 40 pixels."""
    folder = tmp_path_factory.mktemp("points")
    (folder / "config.yaml").write_text(TINY)
    cfg = load_config(str(folder / "config.yaml"))
    cfg.MODEL.ADAPTIS.NUM_THINGS = 2
    torch.manual_seed(0)
    model = build_model(cfg)
    Checkpointer(model, str(folder), thing_classes=["rod", "disc"]).save("weights")
    pixels = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "photo.png")
    return folder


def run(files, output, *arguments, weights="weights.pth", config="config.yaml"):
    options = ["--config-file", files / config, "--weights", files / weights, "--output", output]
    return predict.main([str(x) for x in (*options, *arguments)])


def error_lines(capsys):
    """Lines of our own: the log of an earlier test may complain that its output is closed."""
    return [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]


def results_of(folder):
    return json.loads((folder / "coco_results.json").read_text())


def test_one_result_per_point_in_order(files, tmp_path):
    points = ["5,7", "50.5,30", "5,7"]
    assert run(files, tmp_path, "--json", "--points", *points, files / "photo.png") == 0
    results = results_of(tmp_path)
    assert len(results) == 3
    assert results[0] == results[2]
    assert results[0]["score"] != results[1]["score"]
    assert {result["category_id"] for result in results} <= {1, 2}


@pytest.mark.parametrize("order", ["inputs last", "inputs first", "between options"])
def test_inputs_and_points_may_come_in_any_order(files, tmp_path, order):
    photo, points = files / "photo.png", ("--points", "5,7", "20,20")
    arguments = {
        "inputs last": (*points, photo),
        "inputs first": (photo, *points),
        "between options": (*points, "--json", photo),
    }[order]
    assert run(files, tmp_path, *arguments) == 0
    assert (tmp_path / "photo.png").exists()


def test_overrides_may_follow_the_inputs(files, tmp_path):
    arguments = ("--points", "5,7", files / "photo.png", "MODEL.ADAPTIS.TEST.MASK_THRESH", "2.0")
    assert run(files, tmp_path, "--json", *arguments) == 0
    (result,) = results_of(tmp_path)
    assert result["bbox"][2:] == [0, 0]  # no probability exceeds 2


def test_the_points_are_drawn(files, tmp_path):
    assert run(files, tmp_path, "--points", "30,20", files / "photo.png") == 0
    drawn = np.asarray(Image.open(tmp_path / "photo.png"))
    assert drawn.shape == (40, 60, 3)
    assert (drawn[20, 30] == 0).all() and (drawn[20, 32] > 100).all()


@pytest.mark.parametrize("point", [(0, 0), (29.4, 19.6), (29, 0)])
def test_a_dot_is_centred_on_its_pixel(point):
    image = np.full((20, 30, 3), 128, np.uint8)
    drawn = draw_points(image, [point])
    assert (image == 128).all()
    x, y = round(point[0]), min(19, round(point[1]))
    rows, columns = np.nonzero((drawn != 128).any(-1))
    assert (drawn[y, x] == 0).all() or point[1] > 19
    assert abs(rows - point[1]).max() <= 3 and abs(columns - point[0]).max() <= 3


@pytest.mark.parametrize(("point", "code"), [("60,10", 1), ("10,40", 1), ("59,39", 0)])
def test_a_point_outside_an_image_skips_the_image_by_name(files, tmp_path, capsys, point, code):
    assert run(files, tmp_path, "--points", point, files / "photo.png") == code
    errors = capsys.readouterr().err
    assert ("skipped" in errors) == bool(code)
    if code:
        assert "photo.png: point 0" in errors and "outside the image" in errors
        assert not (tmp_path / "photo.png").exists()


@pytest.mark.parametrize("point", ["nan,3", "3,inf", "7", "1,2,3", "a,b"])
def test_what_is_no_point_is_named(files, tmp_path, capsys, point):
    assert run(files, tmp_path, "--points", point, files / "photo.png") == 2
    (line,) = error_lines(capsys)
    assert line.startswith(f"error: --points {point}: ")


def test_points_without_an_input(files, tmp_path, capsys):
    assert run(files, tmp_path, "--points", "3,4") == 2
    assert "INPUT" in capsys.readouterr().err


def test_a_model_that_takes_no_points_is_named(files, tmp_path, capsys):
    config = load_config()
    config.merge_from_file(str(files / "config.yaml"))
    config.MODEL.META_ARCHITECTURE = "SOLOv2"
    config.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
    config.MODEL.RESNETS.merge_from_list(
        ["DEPTH", 18, "RES2_OUT_CHANNELS", 64, "OUT_FEATURES", ["res2", "res3", "res4", "res5"]]
    )
    config.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    config.MODEL.FPN.OUT_CHANNELS = 32
    config.MODEL.SOLO.merge_from_list(["NUM_CONVS", 1, "CONV_DIM", 32, "NUM_CLASSES", 2])
    config.MODEL.SOLOV2.merge_from_list(["MASK_DIM", 32, "MASK_CONV_DIM", 32])
    (files / "solov2.yaml").write_text(config.dump())
    Checkpointer(build_model(config), str(files), thing_classes=["a", "b"]).save("solov2")
    code = run(
        *(files, tmp_path, "--points", "3,4", files / "photo.png"),
        weights="solov2.pth",
        config="solov2.yaml",
    )
    assert code == 2
    (line,) = error_lines(capsys)
    assert "SOLOv2" in line and "points" in line


def test_without_points_everything_is_found(files, tmp_path):
    assert run(files, tmp_path, "--json", files / "photo.png") == 0
    assert (tmp_path / "photo.png").exists()


class OnePixel:
    """Stands for an ``AdaptISPredictor``: counts the images, refuses every point."""

    images = 0

    def set_image(self, image):
        self.images += 1

    def predict(self, points):
        raise ValueError("point 0 is outside the image")


def test_the_image_is_set_once_and_errors_are_of_the_file():
    stand_in = OnePixel()
    predictor = PointsPredictor(stand_in, [(1.0, 2.0), (3.0, 4.0)])
    with pytest.raises(UnreadableError, match="point 0"):
        predictor(np.zeros((4, 4, 3), np.uint8))
    assert stand_in.images == 1
    assert hasattr(AdaptISPredictor, "set_image") and hasattr(AdaptISPredictor, "predict")
