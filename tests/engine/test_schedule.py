"""Epochs instead of iterations."""

import pytest

from solo_d2.config import load_config
from solo_d2.engine.schedule import schedule, set_epochs

COCO_3X = [
    *(
        "SOLVER.IMS_PER_BATCH",
        "16",
        "SOLVER.MAX_ITER",
        "270000",
        "SOLVER.STEPS",
        "(210000, 250000)",
    ),
    *("SOLVER.WARMUP_ITERS", "1000", "SOLVER.CHECKPOINT_PERIOD", "10000"),
    *("TEST.EVAL_PERIOD", "27000"),
]


def test_the_schedule_keeps_its_proportions():
    cfg = load_config(opts=[*COCO_3X, "SOLVER.IMS_PER_BATCH", "4"])
    assert schedule(cfg, images=3600, epochs=30) == {
        "SOLVER.MAX_ITER": 27000,
        "SOLVER.STEPS": (21000, 25000),
        "SOLVER.WARMUP_ITERS": 100,
        "SOLVER.CHECKPOINT_PERIOD": 1000,
        "TEST.EVAL_PERIOD": 2700,
    }
    assert cfg.SOLVER.MAX_ITER == 270000


def test_a_tiny_training_still_has_a_valid_schedule():
    cfg = load_config(opts=[*COCO_3X, "TEST.EVAL_PERIOD", "0"])
    assert schedule(cfg, images=3, epochs=1) == {
        "SOLVER.MAX_ITER": 1,
        "SOLVER.STEPS": (),
        "SOLVER.WARMUP_ITERS": 0,
        "SOLVER.CHECKPOINT_PERIOD": 1,
        "TEST.EVAL_PERIOD": 0,
    }
    assert schedule(cfg, images=17, epochs=1)["SOLVER.MAX_ITER"] == 2  # the last batch is whole


@pytest.mark.parametrize(("images", "epochs"), [(0, 3), (10, 0), (10, -1), (10, float("inf"))])
def test_nothing_to_train_is_refused(images, epochs):
    with pytest.raises(ValueError, match="image" if not images else "epochs must be"):
        schedule(load_config(), images=images, epochs=epochs)


def test_an_epoch_has_the_images_that_are_trained_on(toy_cfg, monkeypatch):
    cfg = toy_cfg()
    loader = "solo_d2.engine.schedule.DatasetCatalog.get"
    objects, crowd = [{"iscrowd": 0}], [{"iscrowd": 1}]
    records = [{"annotations": x} for x in (objects, crowd, [], objects, objects, objects)]
    monkeypatch.setattr(loader, lambda name: records)
    set_epochs(cfg, 6)
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS) == (12, (9,))
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False
    set_epochs(cfg, 6)
    assert cfg.SOLVER.MAX_ITER == 18
