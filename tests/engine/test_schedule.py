"""Epochs instead of iterations."""

import pytest

from solo_d2.config import load_config
from solo_d2.engine import schedule, set_epochs
from solo_d2.errors import UserError

COCO_3X = [
    *("SOLVER.IMS_PER_BATCH", "16", "SOLVER.MAX_ITER", "270000"),
    *("SOLVER.STEPS", "(210000, 250000)", "SOLVER.WARMUP_ITERS", "1000"),
    *("SOLVER.CHECKPOINT_PERIOD", "10000", "TEST.EVAL_PERIOD", "27000"),
]


@pytest.fixture
def scaled(monkeypatch):
    """(images, epochs, *opts) -> the schedule of a COCO config for so many images"""

    def scale(images, epochs, *opts):
        cfg = load_config(opts=[*COCO_3X, *opts])
        monkeypatch.setattr(schedule, "training_records", lambda cfg: range(images))
        set_epochs(cfg, epochs)
        names = ("MAX_ITER", "STEPS", "WARMUP_ITERS", "CHECKPOINT_PERIOD")
        return *(cfg.SOLVER[name] for name in names), cfg.TEST.EVAL_PERIOD

    return scale


def test_the_schedule_keeps_its_proportions(scaled):
    expected = (27000, (21000, 25000), 100, 1000, 2700)
    assert scaled(3600, 30, "SOLVER.IMS_PER_BATCH", "4") == expected


def test_a_tiny_training_still_has_a_valid_schedule(scaled):
    assert scaled(3, 1, "TEST.EVAL_PERIOD", "0") == (1, (), 0, 1, 0)
    assert scaled(17, 1)[0] == 2  # the last batch is whole


@pytest.mark.parametrize("epochs", [0, -1, float("inf")])
def test_numbers_of_epochs_that_mean_nothing_are_refused(epochs):
    with pytest.raises(UserError, match="--epochs must be a positive number"):
        set_epochs(load_config(), epochs)


def test_data_without_a_length_need_iterations(monkeypatch):
    monkeypatch.setattr(schedule, "training_records", lambda cfg: iter(()))
    with pytest.raises(UserError, match="has no length; set SOLVER.MAX_ITER"):
        set_epochs(load_config(), 3)


def test_an_epoch_has_the_images_that_are_trained_on(toy_cfg, monkeypatch):
    cfg = toy_cfg()
    loader = "detectron2.data.DatasetCatalog.get"
    objects, crowd = ([{"iscrowd": i, "category_id": 0}] for i in (0, 1))
    sizes = {"width": 9, "height": 9}
    records = [{"annotations": x, **sizes} for x in (objects, crowd, [], *[objects] * 3)]
    monkeypatch.setattr(loader, lambda name: records)
    set_epochs(cfg, 6)
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS) == (12, (9,))
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False
    set_epochs(cfg, 6)
    assert cfg.SOLVER.MAX_ITER == 18
