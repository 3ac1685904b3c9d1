"""EPS in Detectron2's own trainer and predictor, and in ours."""

import json

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, build_detection_train_loader
from detectron2.engine import DefaultPredictor, DefaultTrainer
from tiny_models import EPS
from torch import nn

import solo_d2
from solo_d2.config import load_config
from solo_d2.data import ImageLabelMapper, setup_datasets
from solo_d2.data.label_maps import read_label_map
from solo_d2.engine import Trainer
from solo_d2.tools.predict import main

OPTIONS = {
    **EPS,
    "MODEL.DEVICE": "cpu",
    "MODEL.MASK_ON": True,
    "DATASETS.TRAIN": ("shapes_train",),
    "DATASETS.TEST": ("shapes_val",),
    "DATASETS.SHAPES.IMAGE_SIZE": (48, 64),
    "DATASETS.SHAPES.TRAIN_IMAGES": 6,
    "DATASETS.SHAPES.VAL_IMAGES": 3,
    "INPUT.FORMAT": "RGB",
    "INPUT.MASK_FORMAT": "bitmask",
    "INPUT.MIN_SIZE_TRAIN": (48,),
    "INPUT.MIN_SIZE_TEST": 48,
    "SOLVER.IMS_PER_BATCH": 2,
    "SOLVER.MAX_ITER": 2,
    "SOLVER.WARMUP_ITERS": 0,
    "SOLVER.BASE_LR": 0.01,
    "DATALOADER.NUM_WORKERS": 0,
    "TEST.EVAL_PERIOD": 0,
}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOLO_D2_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def config(folder, **more):
    values = {**OPTIONS, **{k.replace("__", "."): v for k, v in more.items()}}
    cfg = load_config(opts=[x for item in values.items() for x in item])
    cfg.OUTPUT_DIR = str(folder)
    setup_datasets(cfg)
    return cfg


def last_metrics(folder):
    return json.loads((folder / "metrics.json").read_text().splitlines()[-1])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of two iterations of our trainer, and its results."""
    folder = tmp_path_factory.mktemp("run")
    cfg = config(folder)
    (folder / "config.yaml").write_text(cfg.dump())
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    return folder, trainer.train()


def test_detectron2s_trainer_derives_labels_and_saliency_from_instances(tmp_path):
    cfg = config(tmp_path, DATASETS__TEST=())
    DefaultTrainer(cfg).train()
    assert {"loss_cls", "loss_sal"} <= last_metrics(tmp_path).keys()


def test_our_mapper_fits_detectron2s_loader(tmp_path):
    cfg = config(tmp_path)
    batch = next(iter(build_detection_train_loader(cfg, mapper=ImageLabelMapper(cfg))))
    assert len(batch) == 2
    assert all(x["image_labels"].shape == (5,) and "sem_seg" in x for x in batch)


def test_our_trainer_evaluates_miou_and_keeps_the_best(run):
    folder, results = run
    assert 0 <= results["sem_seg"]["mIoU"] <= 100
    assert (folder / "model_best.pth").is_file()
    stored = json.loads((folder / "results.json").read_text())
    assert stored["sem_seg"]["mIoU"] == pytest.approx(results["sem_seg"]["mIoU"])
    maps = sorted((folder / "inference" / "label_maps").glob("*.png"))
    assert len(maps) == 3
    # training images have known labels: no pixel has a class that is not in the image
    for record in DatasetCatalog.get("shapes_val"):
        name = record["file_name"].rsplit("/", 1)[1].replace(".jpg", ".png")
        found = set(np.unique(read_label_map(folder / "inference" / "label_maps" / name)).tolist())
        assert found <= {0, *(a["category_id"] + 1 for a in record["annotations"])}


@pytest.fixture(scope="module")
def image(run):
    return DatasetCatalog.get("shapes_val")[0]["file_name"]


def test_detectron2s_predictor_gives_scores_of_pixels(run, image, tmp_path):
    cfg = config(tmp_path, MODEL__WEIGHTS=str(run[0] / "model_final.pth"))
    scores = DefaultPredictor(cfg)(cv2.imread(image))["sem_seg"]
    assert scores.shape == (6, 48, 64)


def test_our_predictor_gives_the_same_label_map_and_its_regions(run, image, tmp_path):
    result = solo_d2.load(run[0]).predict(image)
    cfg = config(tmp_path, MODEL__WEIGHTS=str(run[0] / "model_best.pth"))
    scores = DefaultPredictor(cfg)(cv2.imread(image))["sem_seg"]
    assert np.array_equal(result.label_map, scores.argmax(dim=0).numpy())
    classes = result.instances.pred_classes.tolist()
    assert classes == [x - 1 for x in np.unique(result.label_map).tolist() if x]
    result.save(tmp_path / "drawn.png")


def test_predict_writes_label_maps(run, image, tmp_path):
    words = ["--weights", str(run[0]), "--output", str(tmp_path / "out"), image]
    assert main([*words, "--format", "label-maps", "--format", "pictures"]) == 0
    (written,) = (tmp_path / "out").glob("*.labels.png")
    expected = solo_d2.load(run[0]).predict(image).label_map
    assert np.array_equal(read_label_map(written), expected)


def test_the_poly_schedule_is_that_of_deeplab(tmp_path):
    options = {"SOLVER__LR_SCHEDULER_NAME": "WarmupPolyLR", "SOLVER__MAX_ITER": 4}
    cfg = config(tmp_path, **options)
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": rate} for rate in (0.01, 0.1)]
    optimizer = torch.optim.SGD(groups, lr=0.01)
    scheduler = Trainer.build_lr_scheduler(cfg, optimizer)
    for done in range(1, 4):
        optimizer.step()
        scheduler.step()
        found = [group["lr"] for group in optimizer.param_groups]
        factor = (1 - done / 4) ** 0.9
        assert found == pytest.approx([0.01 * factor, 0.1 * factor])
