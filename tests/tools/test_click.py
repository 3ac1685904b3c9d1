"""The command that clicks into every object and measures how well it is found."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Instances
from PIL import Image

from solo_d2.checkpoint.checkpointer import Checkpointer
from solo_d2.config import load_config
from solo_d2.data import RODS
from solo_d2.tools import click
from solo_d2.tools.click import Clicks, most_interior_pixel, summary


def test_the_most_interior_pixel_is_in_the_middle_of_the_widest_part():
    mask = np.zeros((20, 30), bool)
    mask[4:6, 2:20] = True
    mask[3:12, 20:29] = True
    assert most_interior_pixel(mask) == (24, 7)


def test_the_border_of_the_image_is_an_edge():
    mask = np.zeros((9, 20), bool)
    mask[:, :9] = True
    assert most_interior_pixel(mask) == (4, 4)
    assert most_interior_pixel(np.ones((1, 1), bool)) == (0, 0)


def polygon(left, top, right, bottom, iscrowd=0):
    box = [left, top, right, bottom]
    outline = [left, top, right, top, right, bottom, left, bottom]
    return {
        "bbox": box,
        "bbox_mode": 0,
        "segmentation": [outline],
        "category_id": 0,
        "iscrowd": iscrowd,
    }


class Quarters:
    """Stands in for a ``Predictor``: a click finds its quarter of the image."""

    def set_image(self, image):
        self.size = image.shape[:2]

    def click(self, points):
        height, width = self.size
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        masks = [
            ((y < height / 2) == (py < height / 2)) & ((x < width / 2) == (px < width / 2))
            for px, py in points
        ]
        return SimpleNamespace(instances=Instances(self.size, pred_masks=torch.stack(masks)))


@pytest.fixture
def record(tmp_path):
    Image.new("RGB", (40, 20)).save(tmp_path / "x.png")
    return {"file_name": str(tmp_path / "x.png"), "height": 20, "width": 40}


def test_ious_are_those_of_the_objects(record):
    objects = [polygon(0, 0, 20, 10), polygon(20, 10, 30, 20), polygon(0, 0, 40, 20, iscrowd=1)]
    clicks = click.click(Quarters(), {**record, "annotations": objects})
    assert clicks.ious == pytest.approx([1.0, 0.5])
    assert clicks.image_seconds >= 0 and clicks.click_seconds > 0


def test_an_image_without_objects_is_left_out(record):
    for annotations in ([], [polygon(0, 0, 9, 9, iscrowd=1)], [polygon(50, 50, 60, 60)]):
        assert click.click(Quarters(), {**record, "annotations": annotations}) is None


def test_the_summary_is_about_objects_not_images():
    text = summary([Clicks(np.array([1.0, 0.8]), 0.2, 0.1), Clicks(np.array([0.3]), 0.4, 0.05)])
    assert text.splitlines() == [
        "3 objects in 2 images: mean IoU 0.7000; 66.7% at least 0.5, 66.7% at least 0.75, "
        "33.3% at least 0.85",
        "300.0 ms per image, then 50.0 ms per click",
    ]


CONFIG = """
VERSION: 2
MODEL:
  META_ARCHITECTURE: "AdaptIS"
  DEVICE: "cpu"
  WEIGHTS: ""
  BACKBONE: {NAME: "build_adaptis_unet_backbone"}
  UNET: {WIDTH: 4, LEVELS: 3}
  ADAPTIS: {CONV_DIM: 4, SEMANTIC_DIM: 4}
DATASETS:
  TRAIN: ("rods_train",)
  TEST: ("rods_val",)
INPUT: {MIN_SIZE_TEST: 32, FORMAT: "RGB"}
"""


def error_lines(capsys):
    """Lines of our own: the log of an earlier test may complain that its output is closed."""
    return [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setenv("SOLO_D2_CACHE", str(tmp_path / "cache"))
    RODS.register(train_images=1, val_images=2, image_size=(32, 48))
    (tmp_path / "config.yaml").write_text(CONFIG)
    yield str(tmp_path / "config.yaml")
    RODS.register()


def test_the_command_clicks_into_each_object(config, tmp_path, capsys):
    cfg = load_config(config)
    cfg.MODEL.ADAPTIS.NUM_THINGS = 1
    Checkpointer(build_model(cfg), str(tmp_path), thing_classes=["rod"]).save("weights")
    assert click.main(["--config-file", config, "--weights", str(tmp_path / "weights.pth")]) == 0
    assert "objects in 2 images: mean IoU " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "no weights"),
        (("--weights", "missing.pth"), "missing.pth"),
        (("--weights", "x", "MODEL.NO_SUCH_KEY", "1"), "NO_SUCH_KEY"),
    ],
)
def test_wrong_input_gives_one_line(config, capsys, arguments, message):
    assert click.main(["--config-file", config, *arguments]) == 2
    (line,) = error_lines(capsys)
    assert message in line
