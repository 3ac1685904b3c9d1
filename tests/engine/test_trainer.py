# numpy's global state is part of what is tested
# ruff: noqa: NPY002

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.engine import HookBase

from solo_d2.engine import NonFiniteLossError, Trainer, scale_learning_rate
from solo_d2.engine.hooks import MetricWriters
from solo_d2.errors import UserError
from solo_d2.modeling.num_classes import dataset_num_classes

NOT_COMPARED = {"time", "data_time", "eta_seconds"}


class Crash(Exception):
    """Stands for a kill."""


class CrashAt(HookBase):
    def __init__(self, iteration):
        self.iteration = iteration

    def before_step(self):
        if self.trainer.iter == self.iteration:
            raise Crash


def make_trainer(cfg, *, resume=False):
    trainer = Trainer(cfg)
    writers = next(h for h in trainer._hooks if isinstance(h, MetricWriters))
    writers._period = 3
    trainer.resume_or_load(resume=resume)
    return trainer


def start(cfg):
    """A new training from the weights and the random state that all tests start from."""
    torch.manual_seed(0)
    np.random.seed(0)
    return make_trainer(cfg)


def metrics(cfg):
    """The lines of metrics.json as text (so NaN equals NaN), without times."""
    text = (Path(cfg.OUTPUT_DIR) / "metrics.json").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    kept = [{k: v for k, v in line.items() if k not in NOT_COMPARED} for line in lines]
    return [json.dumps(line, sort_keys=True) for line in kept]


def assert_same_model(first, second):
    for name, value in first.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name


@pytest.mark.parametrize(
    ("seed", "num_workers", "sgd_momentum"), [(7, 0, 0.9), (-1, 0, 0.9), (7, 1, 0.0)]
)
def test_a_resumed_training_equals_an_uninterrupted_one(
    toy_cfg, tmp_path, seed, num_workers, sgd_momentum
):
    common = ("SEED", seed, "SOLVER.MOMENTUM", sgd_momentum, "TEST.EVAL_PERIOD", 4)
    whole = toy_cfg(*common, "OUTPUT_DIR", str(tmp_path / "whole"))
    uninterrupted = start(whole)
    uninterrupted.train()

    cut = toy_cfg(*common, "OUTPUT_DIR", str(tmp_path / "cut"))
    killed = start(cut)
    killed.register_hooks([CrashAt(8)])
    with pytest.raises(Crash):
        killed.train()
    # the loading processes have no influence either
    cut.DATALOADER.NUM_WORKERS = num_workers
    torch.manual_seed(99)
    resumed = make_trainer(cut, resume=True)
    resumed.train()

    assert resumed.start_iter == 5 and resumed.seed == uninterrupted.seed
    assert_same_model(uninterrupted, resumed)
    assert metrics(whole) == metrics(cut)
    assert len(metrics(whole)) == 7  # iterations 2, 3 (evaluation), 5, 7 (evaluation), 8, 11, end


@pytest.mark.parametrize("crash_after_checkpoint", [False, True])
def test_an_evaluation_that_was_killed_is_made_up_for(toy_cfg, tmp_path, crash_after_checkpoint):
    common = ("SEED", 1, "TEST.EVAL_PERIOD", 5)
    whole = toy_cfg(*common, "OUTPUT_DIR", str(tmp_path / "whole"))
    uninterrupted = start(whole)
    uninterrupted.train()

    cut = toy_cfg(*common, "OUTPUT_DIR", str(tmp_path / "cut"))
    killed = start(cut)
    if crash_after_checkpoint:
        killed.register_hooks([CrashAt(5)])
    else:

        def crash(*args):
            raise Crash

        killed.test = crash
    with pytest.raises(Crash):
        killed.train()
    resumed = make_trainer(cut, resume=True)
    assert resumed.start_iter == 5
    assert resumed.step_finished == crash_after_checkpoint
    resumed.train()

    assert_same_model(uninterrupted, resumed)
    assert metrics(whole) == metrics(cut)


def test_a_finished_training_is_only_evaluated_again(toy_cfg):
    cfg = toy_cfg("SEED", 1)
    first = start(cfg)
    results = first.train()
    lines = metrics(cfg)
    again = make_trainer(cfg, resume=True)
    assert again.start_iter == 12
    text = json.dumps(results)  # with NaN, which does not equal itself
    assert json.dumps(again.train()) == text
    assert metrics(cfg) == lines
    written = json.loads((Path(cfg.OUTPUT_DIR) / "results.json").read_text())
    assert json.dumps(written) == text
    assert {"bbox", "segm"} == set(results)


def test_resume_without_checkpoint_starts_afresh_and_keeps_the_old_curve_apart(toy_cfg):
    cfg = toy_cfg("SEED", 1, "SOLVER.MAX_ITER", 3)
    folder = Path(cfg.OUTPUT_DIR)
    folder.mkdir()
    (folder / "metrics.json").write_text('{"iteration": 0}\n')
    trainer = make_trainer(cfg, resume=True)
    assert trainer.start_iter == 0
    trainer.train()
    assert [json.loads(line)["iteration"] for line in metrics(cfg)] == [2, 3]
    assert (folder / "metrics.previous.json").read_text() == '{"iteration": 0}\n'


def test_a_half_written_line_is_dropped(toy_cfg):
    cfg = toy_cfg("SEED", 1)
    killed = start(cfg)
    killed.register_hooks([CrashAt(6)])
    with pytest.raises(Crash):
        killed.train()
    path = Path(cfg.OUTPUT_DIR) / "metrics.json"
    path.write_text(path.read_text() + '{"iteration": 1')
    make_trainer(cfg, resume=True).train()
    assert [json.loads(line)["iteration"] for line in metrics(cfg)] == [2, 5, 8, 11, 12]


def test_the_best_checkpoint_survives_a_resume(toy_cfg):
    cfg = toy_cfg("SEED", 1, "TEST.EVAL_PERIOD", 2, "SOLVER.CHECKPOINT_PERIOD", 4)
    folder = Path(cfg.OUTPUT_DIR)

    def with_scores(trainer, scores):
        scores = iter(scores)
        trainer.test = lambda *args: {"segm": {"AP": next(scores)}}
        return trainer

    killed = with_scores(start(cfg), [1.0, 5.0, 3.0])
    killed.register_hooks([CrashAt(7)])
    with pytest.raises(Crash):
        killed.train()
    best = torch.load(folder / "model_best.pth", weights_only=True)
    assert best["iteration"] == 3
    # the best is no checkpoint to resume from
    assert (folder / "last_checkpoint").read_text() == "model_0000003.pth"

    resumed = with_scores(make_trainer(cfg, resume=True), [3.0, 4.0, float("nan"), 4.9])
    resumed.train()
    assert torch.load(folder / "model_best.pth", weights_only=True)["iteration"] == 3
    assert (folder / "last_checkpoint").read_text() == "model_final.pth"


def poison(trainer, iteration):
    """Make one loss of one iteration NaN."""
    model, forward = trainer.model, trainer.model.forward

    def poisoned(batch):
        losses = forward(batch)
        if trainer.iter == iteration and model.training:
            losses["loss_b"] = losses["loss_b"] * float("nan")
        return losses

    model.forward = poisoned
    return trainer


def test_a_loss_that_is_not_finite_stops_before_its_step(toy_cfg):
    cfg = toy_cfg("SEED", 1)
    trainer = poison(start(cfg), 6)
    with pytest.raises(NonFiniteLossError, match="iteration 6: loss_b not finite"):
        trainer.train()
    report = json.loads((Path(cfg.OUTPUT_DIR) / "nonfinite_loss.json").read_text())
    assert report["iteration"] == 6
    (process,) = report["processes"]
    assert process["losses"]["loss_b"] == "nan" and process["losses"]["loss_a"] >= 0
    assert len(process["images"]) == 2
    assert all(Path(x["file_name"]).exists() and x["image_id"] >= 0 for x in process["images"])
    assert all(p.isfinite().all() for p in trainer.model.parameters())
    assert not list(Path(cfg.OUTPUT_DIR).glob("model_final*"))
    # and training goes on from the last checkpoint
    resumed = make_trainer(cfg, resume=True)
    assert resumed.start_iter == 5
    resumed.train()


def test_steps_with_such_losses_can_be_skipped(toy_cfg, caplog):
    cfg = toy_cfg("SEED", 1, "SOLVER.STOP_ON_NONFINITE_LOSS", False)
    trainer = poison(start(cfg), 6)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert "iteration 6: loss_b not finite" in caplog.text
    assert all(p.isfinite().all() for p in trainer.model.parameters())


def test_mixed_precision_on_the_cpu_says_what_it_does(toy_cfg, caplog):
    cfg = toy_cfg("SEED", 1, "SOLVER.AMP.ENABLED", True)
    with caplog.at_level(logging.WARNING):
        trainer = start(cfg)
    assert "bfloat16" in caplog.text
    seen = []
    trainer.model.layer.register_forward_hook(lambda m, x, out: seen.append(out.dtype))
    trainer.train()
    assert seen[0] == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())


def test_pictures_of_the_same_images_after_each_evaluation(toy_cfg):
    cfg = toy_cfg("SEED", 1, "TEST.VIS_IMAGES", 2, "TEST.EVAL_PERIOD", 6)
    start(cfg).train()
    pictures = sorted(
        str(p.relative_to(cfg.OUTPUT_DIR)) for p in Path(cfg.OUTPUT_DIR).rglob("*.png")
    )
    assert pictures == [
        "vis/iter_0000005/shapes_val.png",
        "vis/iter_0000011/shapes_val.png",
    ]


def test_the_learning_rate_follows_the_batch_once(toy_cfg, caplog):
    cfg = toy_cfg("SOLVER.LR_REFERENCE_BATCH", 16, "SOLVER.IMS_PER_BATCH", 4)
    with caplog.at_level(logging.INFO):
        scale_learning_rate(cfg)
        scale_learning_rate(cfg)
    assert cfg.SOLVER.BASE_LR == pytest.approx(0.1 / 4)
    assert caplog.text.count("SOLVER.BASE_LR 0.1 for a batch of 16 becomes 0.025") == 1


def test_weights_of_another_number_of_classes_name_both(toy_cfg, tmp_path):
    path = tmp_path / "other.pth"
    state = start(toy_cfg()).model.state_dict()
    torch.save({"model": state, "solo_d2": {"thing_classes": ["a", "b"]}}, path)
    with pytest.raises(UserError, match=r"other\.pth are for 2 classes, the model has \d+"):
        start(toy_cfg("MODEL.WEIGHTS", str(path)))
    start(toy_cfg("MODEL.WEIGHTS", str(path), "MODEL.WEIGHTS_SKIP_MISMATCHED", True))


def test_mask_rcnn_resumes_exactly_too(toy_cfg, tmp_path):
    """It draws random numbers: which proposals are trained on."""

    def config(folder):
        cfg = toy_cfg(
            *("MODEL.META_ARCHITECTURE", "GeneralizedRCNN", "MODEL.MASK_ON", True),
            *("MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone", "MODEL.BACKBONE.FREEZE_AT", 0),
            *("MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64),
            *("MODEL.RESNETS.OUT_FEATURES", ["res4", "res5"], "MODEL.FPN.OUT_CHANNELS", 16),
            *("MODEL.FPN.IN_FEATURES", ["res4", "res5"], "MODEL.RPN.IN_FEATURES", ["p4", "p5"]),
            *("MODEL.ANCHOR_GENERATOR.SIZES", [[16], [32]]),
            *("MODEL.ROI_HEADS.NAME", "StandardROIHeads", "MODEL.ROI_HEADS.IN_FEATURES", ["p4"]),
            *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 8, "MODEL.RPN.BATCH_SIZE_PER_IMAGE", 8),
            *("MODEL.RPN.POST_NMS_TOPK_TRAIN", 50, "MODEL.RPN.POST_NMS_TOPK_TEST", 20),
            *("MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvFCHead", "MODEL.ROI_BOX_HEAD.NUM_FC", 1),
            *("MODEL.ROI_BOX_HEAD.FC_DIM", 16, "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", 3),
            *("MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead"),
            *("MODEL.ROI_MASK_HEAD.NUM_CONV", 1, "MODEL.ROI_MASK_HEAD.CONV_DIM", 16),
            *("SOLVER.BASE_LR", 0.001, "SOLVER.MAX_ITER", 5, "SOLVER.CHECKPOINT_PERIOD", 2),
            *("SOLVER.STEPS", (4,), "SEED", 1, "OUTPUT_DIR", str(tmp_path / folder)),
        )
        cfg.MODEL.ROI_HEADS.NUM_CLASSES = dataset_num_classes(cfg)
        return cfg

    uninterrupted = start(config("whole"))
    uninterrupted.train()
    killed = start(config("cut"))
    killed.register_hooks([CrashAt(3)])
    with pytest.raises(Crash):
        killed.train()
    resumed = make_trainer(config("cut"), resume=True)
    resumed.train()
    assert_same_model(uninterrupted, resumed)
    assert metrics(uninterrupted.cfg) == metrics(resumed.cfg)


def test_detectron2s_architecture_has_channels_last_on_the_cpu():
    cfg = get_cfg()
    cfg.MODEL.DEVICE = "cpu"
    weight = Trainer.build_model(cfg).backbone.res2[0].conv2.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
