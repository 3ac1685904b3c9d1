import json
import logging
from pathlib import Path

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import HookBase
from PIL import Image
from torch.utils.data import Dataset

from solo_d2.engine import NonFiniteLossError, Trainer
from solo_d2.engine.trainer import best_metric
from solo_d2.errors import UserError


class Crash(Exception):
    """Stands for a kill."""


class CrashAt(HookBase):
    def __init__(self, iteration):
        self.iteration = iteration

    def before_step(self):
        if self.trainer.iter == self.iteration:
            raise Crash


def make_trainer(cfg, *, resume=False):
    """A trainer whose ``seen`` collects the images of each batch."""
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=resume)
    trainer.seen = []

    def see(model, args):
        if model.training:
            trainer.seen.append([x["image_id"] for x in args[0]])

    trainer.model.register_forward_pre_hook(see)
    return trainer


def start(cfg):
    """A new training that starts from the same weights in all tests."""
    torch.manual_seed(0)
    return make_trainer(cfg)


def stopped_at(iteration, cfg):
    trainer = start(cfg)
    trainer.register_hooks([CrashAt(iteration)])
    with pytest.raises(Crash):
        trainer.train()
    return trainer


def with_scores(trainer, *scores):
    """Make the evaluations return these results; unused ones stay in ``trainer.scores``."""
    trainer.scores = list(scores)
    trainer.test = lambda *args: {"segm": {"AP": trainer.scores.pop(0)}}
    return trainer


@pytest.mark.parametrize("sampler", ["TrainingSampler", "RepeatFactorTrainingSampler"])
@pytest.mark.parametrize(("seed", "num_workers"), [(7, 0), (-1, 1)])
def test_a_resumed_training_continues_with_the_next_images(
    toy_cfg, tmp_path, seed, num_workers, sampler
):
    common = ("SEED", seed, "DATALOADER.SAMPLER_TRAIN", sampler, "DATALOADER.REPEAT_THRESHOLD", 0.9)
    cut = toy_cfg(*common, "DATALOADER.NUM_WORKERS", num_workers)
    killed = stopped_at(8, cut)
    resumed = make_trainer(cut, resume=True)
    resumed.train()
    assert resumed.start_iter == 5
    uninterrupted = start(toy_cfg(*common, "OUTPUT_DIR", str(tmp_path / "whole")))
    uninterrupted.load_state_dict(
        {**uninterrupted.state_dict(), "seed": killed.state_dict()["seed"]}
    )
    uninterrupted.train()
    assert killed.seen == uninterrupted.seen[:8]
    assert resumed.seen == uninterrupted.seen[5:]
    for name, value in uninterrupted.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], value)


def test_wide_and_high_images_come_in_batches_of_their_own(toy_cfg, named_set, tmp_path):
    records = shapes(toy_cfg())
    for i in range(0, len(records), 3):
        turned = Image.open(records[i]["file_name"]).transpose(Image.Transpose.ROTATE_90)
        turned.save(tmp_path / f"{i}.png")
        records[i] |= {"file_name": str(tmp_path / f"{i}.png"), "width": 48, "height": 64}
        records[i]["annotations"] = []
    named_set("mixed", records)
    cfg = toy_cfg("DATASETS.TRAIN", ("mixed",), "DATALOADER.FILTER_EMPTY_ANNOTATIONS", False)
    is_wide = [
        {x["width"] > x["height"] for x in batch}
        for _, batch in zip(range(12), Trainer.build_train_loader(cfg))
    ]
    assert all(len(kinds) == 1 for kinds in is_wide) and set.union(*is_wide) == {True, False}


def shapes(cfg):
    return DatasetCatalog.get(cfg.DATASETS.TRAIN[0])


@pytest.fixture
def named_set():
    """(name, records) -> a registered data set with the classes of shapes."""
    names = []

    def register(name, records):
        DatasetCatalog.register(name, lambda: records)
        names.append(name)
        classes = MetadataCatalog.get("shapes_train").thing_classes
        MetadataCatalog.get(name).set(thing_classes=classes)

    yield register
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


class Records(Dataset):
    def __init__(self, records):
        self.records = records

    def __len__(self):
        return len(self.records)

    def __getitem__(self, index):
        return self.records[index]


def test_a_torch_data_set_is_mapped_and_continued_too(toy_cfg, named_set):
    named_set("torch_set", Records(shapes(toy_cfg())))
    cfg = toy_cfg("DATASETS.TRAIN", ("torch_set",), "SEED", 1, "DATASETS.TEST", ())
    killed = stopped_at(7, cfg)
    resumed = make_trainer(cfg, resume=True)
    resumed.train()
    assert resumed.start_iter == 5 and resumed.seen[:2] == killed.seen[5:]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("DATASETS.TRAIN", ()), "DATASETS.TRAIN is empty"),
        (("SOLVER.IMS_PER_BATCH", 0), r"SOLVER\.IMS_PER_BATCH is 0, but must be positive"),
        (("SOLVER.IMS_PER_BATCH", -2), r"SOLVER\.IMS_PER_BATCH is -2"),
        (("SOLVER.MAX_ITER", 0), r"SOLVER\.MAX_ITER is 0, but must be positive"),
        (("SOLVER.MAX_ITER", -1), r"SOLVER\.MAX_ITER is -1"),
        (("SOLVER.BASE_LR", 0.0), r"SOLVER\.BASE_LR is 0\.0, but must be positive"),
        (("SOLVER.BASE_LR", -0.1), r"SOLVER\.BASE_LR is -0\.1"),
        (("SOLVER.BASE_LR", float("nan")), r"SOLVER\.BASE_LR is nan"),
        (
            ("SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR", "SOLVER.BASE_LR_END", 2.0),
            r"BASE_LR_END is 2\.0, but must be at most SOLVER\.BASE_LR, 0\.1",
        ),
        (("MODEL.ROI_HEADS.IOU_THRESHOLDS", []), r"ROI_HEADS\.IOU_THRESHOLDS is \[\], but must"),
        (("MODEL.RPN.IOU_THRESHOLDS", [0.7, 0.3]), r"RPN\.IOU_THRESHOLDS is \[0\.7, 0\.3\]"),
        (("MODEL.RPN.IOU_LABELS", [0, 1]), r"RPN\.IOU_LABELS is \[0, 1\], .* \[0\.3, 0\.7\]"),
        (("SOLVER.REFERENCE_WORLD_SIZE", 3), r"multiple of .*REFERENCE_WORLD_SIZE, 3"),
        (("SOLVER.CHECKPOINT_PERIOD", 0), r"SOLVER\.CHECKPOINT_PERIOD is 0"),
        (("DATALOADER.NUM_WORKERS", -1), r"DATALOADER\.NUM_WORKERS is -1, but must be 0 or more"),
        (("MODEL.FPN.OUT_CHANNELS", 0), r"MODEL\.FPN\.OUT_CHANNELS is 0, but must be positive"),
        (("MODEL.FPN.FUSE_TYPE", "max"), r"FUSE_TYPE must be one of sum, avg, not 'max'"),
        (
            (
                *("MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone"),
                *("MODEL.FPN.IN_FEATURES", ["res2", "res3", "res4"]),
            ),
            r"MODEL\.FPN\.IN_FEATURES is .*'res4'\], but must end with 'res5'",
        ),
        (("MODEL.BACKBONE.FREEZE_AT", -1), r"MODEL\.BACKBONE\.FREEZE_AT is -1"),
        (("INPUT.MIN_SIZE_TRAIN", ()), r"INPUT\.MIN_SIZE_TRAIN is \(\)"),
        (("INPUT.MIN_SIZE_TRAIN", (-1,)), r"INPUT\.MIN_SIZE_TRAIN is \(-1,\)"),
        (("INPUT.MIN_SIZE_TEST", -1), r"INPUT\.MIN_SIZE_TEST is -1"),
        (("INPUT.MAX_SIZE_TEST", 0), r"INPUT\.MAX_SIZE_TEST is 0, but must be positive"),
        (("INPUT.MASK_FORMAT", "rle"), r"MASK_FORMAT must be one of polygon, bitmask, not 'rle'"),
        (("INPUT.RANDOM_FLIP", "both"), r"RANDOM_FLIP must be one of .*, not 'both'"),
        (("TEST.PATIENCE", -1), r"TEST\.PATIENCE is -1"),
        (("TEST.AUG.ENABLED", True), r"TEST\.AUG\.ENABLED must be False: ToySegmentor"),
    ],
)
def test_wrong_settings_are_named(toy_cfg, overrides, message):
    with pytest.raises(UserError, match=message):
        Trainer(toy_cfg(*overrides))


def test_images_without_size_name_the_key_that_needs_it(toy_cfg, named_set):
    records = [{k: v for k, v in r.items() if k != "width"} for r in shapes(toy_cfg())]
    named_set("sizeless", records)
    with pytest.raises(UserError, match=r"ASPECT_RATIO_GROUPING needs .*\.jpg"):
        Trainer(toy_cfg("DATASETS.TRAIN", ("sizeless",)))


def test_a_finished_training_is_only_evaluated_again(toy_cfg):
    cfg = toy_cfg("SEED", 1)
    results = start(cfg).train()
    again = make_trainer(cfg, resume=True)
    assert again.start_iter == 12
    assert json.dumps(again.train()) == json.dumps(
        results
    )  # as text, because NaN does not equal itself
    assert again.seen == []
    assert {"bbox", "segm"} == set(results)
    text = (Path(cfg.OUTPUT_DIR) / "results.json").read_text()
    written = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert written["segm"]["AP"] == results["segm"]["AP"]
    assert written["segm"]["APl"] is None  # there are no large objects


def test_the_best_model_survives_a_resume(toy_cfg):
    cfg = toy_cfg("SEED", 1, "TEST.EVAL_PERIOD", 2, "SOLVER.CHECKPOINT_PERIOD", 4)
    folder = Path(cfg.OUTPUT_DIR)
    killed = with_scores(start(cfg), 1.0, 5.0, 3.0)
    killed.register_hooks([CrashAt(7)])
    with pytest.raises(Crash):
        killed.train()
    best = torch.load(folder / "model_best.pth", weights_only=True)
    assert best["iteration"] == 3
    # the best checkpoint is not one to resume from
    assert (folder / "last_checkpoint").read_text() == "model_0000003.pth"

    # the evaluation of iteration 3 may have been cut off, so it is repeated
    resumed = with_scores(make_trainer(cfg, resume=True), 5.0, 3.0, 4.0, float("nan"), 4.9)
    resumed.train()
    assert resumed.scores == []
    assert torch.load(folder / "model_best.pth", weights_only=True)["iteration"] == 3
    assert (folder / "last_checkpoint").read_text() == "model_final.pth"


def test_training_stops_when_evaluations_get_no_better(toy_cfg):
    cfg = toy_cfg("TEST.EVAL_PERIOD", 2, "TEST.PATIENCE", 2, "SEED", 1)
    trainer = with_scores(start(cfg), 1.0, 5.0, 5.0, 4.0, 9.0)
    assert trainer.train() == {"segm": {"AP": 4.0}}
    assert trainer.iter == 7 and len(trainer.seen) == 8
    folder = Path(cfg.OUTPUT_DIR)
    assert (folder / "last_checkpoint").read_text() == "model_final.pth"
    assert torch.load(folder / "model_best.pth", weights_only=True)["iteration"] == 3
    assert json.loads((folder / "results.json").read_text()) == {"segm": {"AP": 4.0}}
    # it stays stopped, unless there is more patience
    again = with_scores(make_trainer(cfg, resume=True), 4.0)
    assert again.train() == {"segm": {"AP": 4.0}} and again.seen == []
    cfg.TEST.PATIENCE = 5
    longer = with_scores(make_trainer(cfg, resume=True), 4.0, 4.0, 4.0)
    longer.train()
    assert len(longer.seen) == 4


@pytest.mark.parametrize(
    ("overrides", "metric"),
    [
        ((), "segm/AP"),
        (("MODEL.MASK_ON", False), "bbox/AP"),
        (("MODEL.META_ARCHITECTURE", "AdaptIS"), "panoptic_seg/PQ"),
        (("TEST.BEST_METRIC", "segm/AP50"), "segm/AP50"),
        (("DATASETS.TEST", ("shapes_val", "shapes_train")), "shapes_val/segm/AP"),
    ],
)
def test_the_metric_of_the_best_model_is_the_one_it_is_made_for(toy_cfg, overrides, metric):
    assert best_metric(toy_cfg(*overrides)) == metric


def test_an_unknown_metric_is_named_with_those_that_there_are(toy_cfg, caplog):
    with caplog.at_level(logging.WARNING):
        start(toy_cfg("TEST.BEST_METRIC", "segm/APP", "SEED", 1)).train()
    assert "TEST.BEST_METRIC 'segm/APP' is not among the results" in caplog.text
    assert "'segm/AP50'" in caplog.text


def poison(trainer, iteration, what):
    """Spoil one iteration: the value of a loss, its gradient, or a buffer of the model."""
    model, forward = trainer.model, trainer.model.forward

    def poisoned(batch):
        losses = forward(batch)
        if trainer.iter == iteration and model.training:
            if what == "loss":
                losses["loss_b"] = losses["loss_b"] * float("nan")
            elif what == "gradient":
                losses["loss_b"].register_hook(lambda gradient: gradient * float("inf"))
            else:
                model.steps.fill_(float("nan"))
        return losses

    model.forward = poisoned
    return trainer


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
@pytest.mark.parametrize(("what", "named"), [("loss", "loss_b"), ("gradient", "the gradient")])
def test_no_step_is_made_with_a_loss_or_gradient_that_is_not_finite(
    toy_cfg, what, named, optimizer
):
    cfg = toy_cfg("SEED", 1, "SOLVER.OPTIMIZER", optimizer, "SOLVER.BASE_LR", 0.01)
    trainer = poison(start(cfg), 6, what)
    with pytest.raises(NonFiniteLossError, match=f"iteration 6: {named} is not finite"):
        trainer.train()
    report = json.loads((Path(cfg.OUTPUT_DIR) / "nonfinite_loss.json").read_text())
    assert report["iteration"] == 6
    (process,) = report["processes"]
    assert process["losses"]["loss_a"] >= 0
    assert (process["losses"]["loss_b"] == "nan") == (what == "loss")
    assert [x["image_id"] for x in process["images"]] == trainer.seen[6]
    assert all(Path(x["file_name"]).exists() for x in process["images"])
    assert all(p.isfinite().all() for p in trainer.model.parameters())
    assert not list(Path(cfg.OUTPUT_DIR).glob("model_final*"))
    # and training goes on from the last checkpoint
    resumed = make_trainer(cfg, resume=True)
    assert resumed.start_iter == 5
    resumed.train()


def test_weights_that_are_not_finite_replace_no_checkpoint(toy_cfg):
    cfg = toy_cfg("SEED", 1)
    with pytest.raises(UserError, match=r"model_0000009\.pth is not written: .* steps"):
        poison(start(cfg), 6, "buffer").train()
    assert (Path(cfg.OUTPUT_DIR) / "last_checkpoint").read_text() == "model_0000004.pth"
    assert not (Path(cfg.OUTPUT_DIR) / "model_0000009.pth").exists()


def test_mixed_precision_on_the_cpu_trains_in_float32_and_says_so(toy_cfg, caplog):
    cfg = toy_cfg("SEED", 1, "SOLVER.AMP.ENABLED", True)
    with caplog.at_level(logging.WARNING):
        trainer = start(cfg)
    assert caplog.text.count("SOLVER.AMP.ENABLED has no effect on the CPU") == 1
    seen = []
    trainer.model.layer.register_forward_hook(lambda m, x, out: seen.append(out.dtype))
    trainer.train()
    assert set(seen) == {torch.float32}


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
