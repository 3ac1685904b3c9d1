"""The command: its files, messages and exit codes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO

from solo_d2.checkpoint.checkpointer import Checkpointer
from solo_d2.config import load_config
from solo_d2.drawing import draw_points
from solo_d2.predictor import Predictor
from solo_d2.tools import predict

ADAPTIS = """
VERSION: 2
MODEL:
  META_ARCHITECTURE: "AdaptIS"
  DEVICE: "cpu"
  WEIGHTS: ""
  BACKBONE: {NAME: "build_adaptis_unet_backbone"}
  UNET: {WIDTH: 4, LEVELS: 3}
  ADAPTIS: {CONV_DIM: 4, SEMANTIC_DIM: 4}
  PIXEL_STD: [127.5, 127.5, 127.5]
DATASETS:
  TRAIN: ()
  TEST: ()
INPUT: {MIN_SIZE_TEST: 32, MAX_SIZE_TEST: 96, FORMAT: "RGB"}
"""
SOLOV2 = """
VERSION: 2
MODEL:
  META_ARCHITECTURE: "SOLOv2"
  DEVICE: "cpu"
  BACKBONE: {NAME: "build_resnet_fpn_backbone"}
  RESNETS:
    DEPTH: 18
    RES2_OUT_CHANNELS: 64
    OUT_FEATURES: ["res2", "res3", "res4", "res5"]
  FPN: {IN_FEATURES: ["res2", "res3", "res4", "res5"], OUT_CHANNELS: 32}
  SOLO: {NUM_CONVS: 1, CONV_DIM: 32, SCORE_THRESH_TEST: 0.0001, MAX_CANDIDATES_TEST: 50}
  SOLOV2: {MASK_DIM: 32, MASK_CONV_DIM: 32}
DATASETS:
  TRAIN: ()
  TEST: ()
INPUT: {MIN_SIZE_TEST: 64, MAX_SIZE_TEST: 96}
"""


def make_run(folder, text, key):
    from detectron2.modeling import build_model

    (folder / "config.yaml").write_text(text)
    torch.manual_seed(0)
    model = build_model(load_config(str(folder / "config.yaml"), opts=[key, "2"]))
    if key == "MODEL.SOLO.NUM_CLASSES":  # without training every score is the same; spread them
        torch.nn.init.normal_(model.head.category_pred.weight, std=0.2)
        torch.nn.init.normal_(model.head.kernel_pred.weight, std=0.2)
    Checkpointer(model, str(folder), thing_classes=["disc", "bar"]).save("model_final")
    return folder


@pytest.fixture(scope="module")
def solov2(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("solov2"), SOLOV2, "MODEL.SOLO.NUM_CLASSES")


@pytest.fixture(scope="module")
def adaptis(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("adaptis"), ADAPTIS, "MODEL.ADAPTIS.NUM_THINGS")


@pytest.fixture
def photo(tmp_path, save_image):
    return save_image(tmp_path / "in" / "photo.png", 40, 60)


def run(weights, output, *arguments):
    options = ["--weights", weights, "--output", output, *arguments]
    return predict.main([str(x) for x in options])


def files_of(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def error_of(capsys):
    """Our only line: the log of an earlier test may complain that its output is closed."""
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    return line


def results_of(folder):
    return json.loads((folder / "coco_results.json").read_text())


def test_pictures_and_coco_results_of_images_of_any_size(solov2, tmp_path, save_image, photo):
    save_image(tmp_path / "in" / "one.png", 1, 1)
    save_image(tmp_path / "in" / "long.png", 8, 5000)
    formats = ["--format", "pictures", "--format", "coco-results"]
    out = tmp_path / "out"
    assert run(solov2, out, tmp_path / "in", *formats, "--score", "0.0") == 0
    assert files_of(out) == ["coco_results.json", "images.json", "long.png", "one.png", "photo.png"]
    assert np.asarray(Image.open(out / "long.png")).shape == (8, 5000, 3)
    dataset = COCO(str(out / "images.json"))
    assert [c["name"] for c in dataset.loadCats(dataset.getCatIds())] == ["disc", "bar"]
    results = dataset.loadRes(str(out / "coco_results.json"))
    sizes = {x["id"]: [x["height"], x["width"]] for x in dataset.dataset["images"]}
    assert len(results.anns) > 0
    for annotation in results.anns.values():
        assert annotation["category_id"] in (1, 2)
        assert annotation["segmentation"]["size"] == sizes[annotation["image_id"]]


def test_coco_data_set_has_paths_below_the_images_common_folder(
    solov2, tmp_path, save_image, photo
):
    save_image(tmp_path / "in" / "sub" / "b.png", 40, 60)
    out = tmp_path / "out"
    assert run(solov2, out, tmp_path / "in", "--format", "coco", "--score", "0.0") == 0
    assert files_of(out) == ["annotations.json"]
    images = json.loads((out / "annotations.json").read_text())["images"]
    assert [x["file_name"] for x in images] == ["photo.png", "sub/b.png"]


def test_skipped_files_give_exit_code_1(solov2, tmp_path, photo, capsys):
    (tmp_path / "in" / "broken.png").write_text("not an image")
    assert run(solov2, tmp_path / "out", tmp_path / "in") == 1
    assert files_of(tmp_path / "out") == ["photo.png"]
    assert "broken.png: not an image" in capsys.readouterr().err


def test_the_limit_of_the_image_size_can_be_changed(solov2, tmp_path, photo, capsys):
    assert run(solov2, tmp_path / "out", photo, "--max-megapixels", "0.002") == 1
    assert "limit of 0.002" in capsys.readouterr().err
    assert run(solov2, tmp_path / "out", photo, "--max-megapixels", "0") == 0


def test_overrides_and_options_come_in_any_order(solov2, tmp_path, photo):
    pair = ["MODEL.SOLO.SCORE_THRESH_TEST", "0.999"]
    for words in ([*pair, photo], [photo, *pair], [photo, *pair, "--score", "0.5"]):
        assert run(solov2, tmp_path / "out", "--format", "coco-results", *words) == 0
        assert results_of(tmp_path / "out") == []


def test_another_type_of_numbers_where_the_device_runs_it(solov2, tmp_path, photo, capsys):
    assert run(solov2, tmp_path / "out", photo, "--dtype", "bfloat16") == 0
    assert run(solov2, tmp_path / "out", photo, "--dtype", "float16") == 2
    assert "dtype must be one of float32, bfloat16" in error_of(capsys)


def test_config_and_weights_may_be_given_apart(solov2, tmp_path, photo):
    config = ["--config-file", solov2 / "config.yaml"]
    assert run(solov2 / "model_final.pth", tmp_path / "out", photo, *config) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing*.png"], "no image or video matches 'nothing*.png'"),
        (["PHOTO", "MODEL.SOLO.SCORE", "1"], "MODEL.SOLO.SCORE"),
        (["PHOTO", "MODEL.SOLO.NUM_CLASSES", "5"], "NUM_CLASSES is 5"),
        (["PHOTO", "--points", "3,4"], "AdaptIS, not SOLOv2"),
        (["--prototypes", "PHOTO"], "--prototypes needs YOLACT, not SOLOv2"),
        (["MODEL.DEVICE", "cpu"], "no INPUT"),
        (["PHOTO", "CLIP", "--format", "coco"], "coco takes images only, not"),
    ],
)
def test_usage_errors_are_one_line_and_exit_code_2(
    solov2, tmp_path, photo, capsys, arguments, message
):
    (tmp_path / "clip.mp4").touch()
    files = {"PHOTO": photo, "CLIP": tmp_path / "clip.mp4"}
    assert run(solov2, tmp_path / "out", *[files.get(x, x) for x in arguments]) == 2
    assert message in error_of(capsys)
    assert not (tmp_path / "out").exists()


def test_missing_files_and_weights_are_named(solov2, tmp_path, photo, capsys):
    assert run(tmp_path / "none.pth", tmp_path / "out", photo) == 2
    assert "none.pth" in error_of(capsys)
    assert run("", tmp_path / "out", photo) == 2
    assert "--weights" in error_of(capsys)
    assert run(solov2, tmp_path / "out", photo, "--config-file", "none.yaml") == 2
    assert "none.yaml" in error_of(capsys)


def test_weights_that_run_code_are_refused_by_name(solov2, tmp_path, photo, capsys):
    class Trap:
        def __reduce__(self):
            return (Path(tmp_path / "ran").touch, ())

    torch.save({"model": Trap()}, tmp_path / "trap.pth")
    config = ["--config-file", solov2 / "config.yaml"]
    assert run(tmp_path / "trap.pth", tmp_path / "out", photo, *config) == 2
    error = error_of(capsys)
    assert "trap.pth" in error and "--allow-pickle" in error
    assert not (tmp_path / "ran").exists()


def test_weights_of_another_model_are_one_line(solov2, tmp_path, photo, capsys):
    torch.save({"model": {"fc.weight": torch.zeros(3)}}, tmp_path / "other.pth")
    words = ["--config-file", solov2 / "config.yaml", "MODEL.SOLO.NUM_CLASSES", "2"]
    assert run(tmp_path / "other.pth", tmp_path / "out", photo, *words) == 2
    assert "other.pth" in error_of(capsys)


# Points


@pytest.mark.parametrize(
    "words",
    [
        "--points 5,7 50.5,30 5,7 PHOTO",
        "PHOTO --points 5,7 50.5,30 5,7",
        "--points 5,7 50.5,30 5,7 --no-labels PHOTO SEED 1",
        "--points 5,7 50.5,30 5,7 SEED 1 PHOTO",
    ],
)
def test_one_result_per_point_in_order_wherever_the_inputs_are(
    adaptis, tmp_path, photo, monkeypatch, words
):
    asked = []
    click = Predictor.click
    monkeypatch.setattr(Predictor, "click", lambda self, x: (asked.append(x), click(self, x))[1])
    words = [photo if word == "PHOTO" else word for word in words.split()]
    assert run(adaptis, tmp_path / "out", "--format", "coco-results", *words) == 0
    assert asked == [[(5, 7), (50.5, 30), (5, 7)]]
    results = results_of(tmp_path / "out")
    assert len(results) == 3 and results[0] == results[2]


def test_the_points_are_drawn(adaptis, tmp_path, photo):
    assert run(adaptis, tmp_path / "out", "--points", "30,20", photo) == 0
    drawn = np.asarray(Image.open(tmp_path / "out" / "photo.png"))
    assert drawn.shape == (40, 60, 3)
    assert (drawn[20, 30] == 0).all() and (drawn[20, 32] > 100).all()


@pytest.mark.parametrize("point", [(0, 0), (29.4, 19.4), (29, 0)])
def test_a_dot_is_centered_on_its_pixel(point):
    image = np.full((20, 30, 3), 128, np.uint8)
    drawn = draw_points(image, [point])
    assert (image == 128).all()
    rows, columns = np.nonzero((drawn != 128).any(-1))
    assert (drawn[round(point[1]), round(point[0])] == 0).all()
    assert abs(rows - round(point[1])).max() <= 3 and abs(columns - round(point[0])).max() <= 3


@pytest.mark.parametrize(("point", "code"), [("60,10", 1), ("10,40", 1), ("59,39", 0)])
def test_a_point_outside_an_image_skips_the_image_by_name(
    adaptis, tmp_path, photo, capsys, point, code
):
    assert run(adaptis, tmp_path / "out", "--points", point, photo) == code
    errors = capsys.readouterr().err
    assert ("skipped" in errors) == bool(code)
    if code:
        assert "photo.png: point 0" in errors and "outside the image" in errors
        assert not (tmp_path / "out" / "photo.png").exists()


@pytest.mark.parametrize("point", ["nan,3", "3,inf", "7", "1,2,3", "a,b"])
def test_what_is_not_a_point_is_named(adaptis, tmp_path, photo, capsys, point):
    assert run(adaptis, tmp_path / "out", "--points", point, photo) == 2
    assert error_of(capsys).startswith(f"error: --points {point}: ")


def test_without_points_everything_is_found(adaptis, tmp_path, photo):
    assert run(adaptis, tmp_path / "out", photo) == 0
    assert (tmp_path / "out" / "photo.png").exists()
