"""Our configs and models in Detectron2's own pipeline: its trainer, mapper, predictor and DDP."""

import json
import logging
import math
import subprocess
import sys
from pathlib import Path

import cv2
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.engine import DefaultPredictor, DefaultTrainer, default_setup
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from torch import distributed as dist
from torch import multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from solo_d2 import add_solo_d2_config
from solo_d2.config import load_config
from solo_d2.data import InstanceMapper, setup_datasets
from solo_d2.engine import Trainer, build_optimizer
from solo_d2.modeling import own_keys
from solo_d2.modeling.num_classes import get_value, num_classes_keys

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
LEAVES = sorted(
    str(path.relative_to(CONFIGS))
    for path in CONFIGS.rglob("*.yaml")
    if not path.name.startswith("Base-")
)
SMALL = {
    "SOLO": "quick/solo_shapes.yaml",
    "DecoupledSOLO": "quick/decoupled_solo_shapes.yaml",
    "SOLOv2": "quick/solov2_shapes.yaml",
    "YOLACT": "quick/yolact_shapes.yaml",
    "CenterMask": "quick/centermask_shapes.yaml",
    "FCOS": "quick/fcos_shapes.yaml",
    "AdaptIS": "quick/adaptis_shapes_stage2.yaml",
}
SIZE = ("DATASETS.SHAPES.IMAGE_SIZE", (64, 64), "DATASETS.SHAPES.TRAIN_IMAGES", 12)


@pytest.fixture
def warnings():
    """The warnings given from now on when models are built."""
    messages = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger(own_keys.__name__)
    logger.addHandler(handler)
    own_keys._warned.clear()
    yield messages
    logger.removeHandler(handler)


@pytest.mark.parametrize("name", LEAVES)
def test_detectron2s_trainer_does_what_a_config_says_or_a_warning_names_it(name, warnings):
    cfg = load_config(str(CONFIGS / name))
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ()
    for key in num_classes_keys(cfg):
        cfg.merge_from_list([key, 3])
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        model = build_model(cfg)
    optimizer = DefaultTrainer.build_optimizer(cfg, model)
    # Detectron2's own keys, honored by its optimizer
    assert {group["lr"] for group in optimizer.param_groups} <= {
        cfg.SOLVER.BASE_LR,
        cfg.SOLVER.BASE_LR * (cfg.SOLVER.BIAS_LR_FACTOR or 1),
    }
    assert len(warnings) <= 1
    for key, (neutral, remedy) in own_keys.OWN_KEYS.items():
        value = get_value(cfg, key)
        asked_for = value != neutral
        named = any(f"{key} {value!r}" in message for message in warnings)
        assert named == asked_for, (key, value)
        assert not asked_for or remedy in warnings[0]
    # and following the warning's advice honors it
    ours = build_optimizer(cfg, model)
    assert type(ours).__name__ == cfg.SOLVER.OPTIMIZER


@pytest.fixture(scope="module")
def users_set(shapes_cache):
    """A user's data, registered in Detectron2's way: classes are unknown until it is loaded."""
    setup_datasets(load_config(opts=("DATASETS.TRAIN", ("shapes_train",), *SIZE)))
    DatasetCatalog.get("shapes_train")  # drawn
    register_again()
    yield "users_train"
    DatasetCatalog.remove("users_train")
    MetadataCatalog.remove("users_train")


def register_again():
    """Without class names, as at the start of a process."""
    if "users_train" in DatasetCatalog:
        DatasetCatalog.remove("users_train")
        MetadataCatalog.remove("users_train")
    drawn = MetadataCatalog.get("shapes_train")
    register_coco_instances("users_train", {}, drawn.json_file, drawn.image_root)


def small_config(name, *overrides):
    options = ("SOLVER.IMS_PER_BATCH", 2, "SOLVER.MAX_ITER", 2, "SOLVER.WARMUP_ITERS", 0)
    options += ("INPUT.MIN_SIZE_TRAIN", (64,), "INPUT.MIN_SIZE_TEST", 64, "MODEL.WEIGHTS", "")
    options += ("DATALOADER.NUM_WORKERS", 0, "TEST.VIS_IMAGES", 0)
    return load_config(str(CONFIGS / SMALL[name]), opts=(*options, *SIZE, *overrides))


@pytest.fixture(scope="module")
def trained(users_set, tmp_path_factory):
    """{architecture: folder} of two iterations of ``DefaultTrainer`` each."""
    folders = {}
    for name in SMALL:
        folders[name] = tmp_path_factory.mktemp(name)
        cfg = small_config(name, "DATASETS.TRAIN", (users_set,), "DATASETS.TEST", ())
        cfg.OUTPUT_DIR = str(folders[name])
        register_again()
        default_setup(cfg, None)
        DefaultTrainer(cfg).train()
    return folders


@pytest.mark.parametrize("name", SMALL)
def test_detectron2s_trainer_trains_on_a_users_set(trained, name):
    lines = (trained[name] / "metrics.json").read_text().splitlines()
    assert json.loads(lines[-1])["total_loss"] > 0
    cfg = get_cfg()
    add_solo_d2_config(cfg)
    cfg.merge_from_file(str(trained[name] / "config.yaml"))
    assert all(get_value(cfg, key) == 5 for key in num_classes_keys(cfg))


PREDICT = """
import sys, cv2, torch
from detectron2.config import get_cfg
from detectron2.engine import DefaultPredictor
from solo_d2 import add_solo_d2_config
image, *folders = sys.argv[1:]
for folder in folders:
    cfg = get_cfg()
    add_solo_d2_config(cfg)
    cfg.merge_from_file(f"{folder}/config.yaml")
    cfg.MODEL.WEIGHTS = f"{folder}/model_final.pth"
    instances = DefaultPredictor(cfg)(cv2.imread(image))["instances"]
    torch.save({"boxes": instances.pred_boxes.tensor, "scores": instances.scores,
                "classes": instances.pred_classes}, f"{folder}/predictions.pth")
"""


@pytest.fixture(scope="module")
def predicted_elsewhere(trained, users_set):
    """Fills the folders with predictions of a process that does not know the data set."""
    image = DatasetCatalog.get(users_set)[0]["file_name"]
    words = [sys.executable, "-c", PREDICT, image, *map(str, trained.values())]
    subprocess.run(words, check=True, cwd=CONFIGS.parent)
    return image


@pytest.mark.parametrize("name", SMALL)
def test_config_and_checkpoint_are_enough_in_a_new_process(trained, predicted_elsewhere, name):
    cfg = load_config(str(trained[name] / "config.yaml"))
    cfg.MODEL.WEIGHTS = str(trained[name] / "model_final.pth")
    here = DefaultPredictor(cfg)(cv2.imread(predicted_elsewhere))["instances"]
    there = torch.load(trained[name] / "predictions.pth", weights_only=True)
    torch.testing.assert_close(there["boxes"], here.pred_boxes.tensor)
    torch.testing.assert_close(there["scores"], here.scores)
    assert torch.equal(there["classes"], here.pred_classes)


def gradients(name, records, rank=None):
    """Gradients of a batch, or of one process's part of it, averaged over the processes."""
    options = ("MODEL.RESNETS.NORM", "FrozenBN", "SOLVER.IMS_PER_BATCH", 4)
    cfg = small_config(name, *options, "INPUT.RANDOM_FLIP", "none")
    setup_datasets(cfg)
    torch.manual_seed(0)
    model = Trainer.build_model(cfg).train()
    mapper = InstanceMapper(cfg, is_train=True)
    batch = [mapper(record) for record in (records if rank is None else records[rank::2])]
    wrapped = model if rank is None else DistributedDataParallel(model, broadcast_buffers=False)
    with EventStorage():
        losses = wrapped(batch)
        sum(losses.values()).backward()
        found = {k: p.grad.clone() for k, p in model.named_parameters() if p.requires_grad}
        # DistributedDataParallel finds parameters without a gradient in the next iteration
        sum(wrapped(batch).values()).backward()
    return {"losses": {k: v.detach() for k, v in losses.items()}, "gradients": found}


def in_a_process(rank, folder, records):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for name in SMALL:
        torch.save(gradients(name, records, rank), f"{folder}/{name}_{rank}.pth")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(users_set, tmp_path_factory):
    """(folder that two gloo processes filled, records of their batch)"""
    folder = tmp_path_factory.mktemp("two")
    cfg = small_config("SOLO")
    setup_datasets(cfg)
    records = [r for r in DatasetCatalog.get("shapes_train") if len(r["annotations"]) > 1][:4]
    mp.start_processes(in_a_process, (str(folder), records), nprocs=2, start_method="fork")
    return folder, records


# AdaptIS samples points at random, CenterMask boxes.
@pytest.mark.parametrize("name", ["SOLO", "DecoupledSOLO", "SOLOv2", "YOLACT", "FCOS"])
def test_two_processes_have_losses_and_gradients_of_the_joined_batch(two_processes, name):
    folder, records = two_processes
    alone = gradients(name, records)
    first, second = (torch.load(f"{folder}/{name}_{i}.pth", weights_only=True) for i in range(2))
    for loss, value in alone["losses"].items():
        mean = (first["losses"][loss] + second["losses"][loss]) / 2
        torch.testing.assert_close(mean, value, rtol=1e-4, atol=1e-6)
    scale = max(g.abs().max() for g in alone["gradients"].values())
    for parameter, gradient in alone["gradients"].items():
        difference = (first["gradients"][parameter] - gradient).abs().max()
        assert difference <= 1e-3 * gradient.abs().max() + 1e-5 * scale, parameter


@pytest.mark.parametrize("name", SMALL)
def test_two_processes_agree_on_gradients_of_every_parameter(two_processes, name):
    first, second = (
        torch.load(f"{two_processes[0]}/{name}_{i}.pth", weights_only=True) for i in range(2)
    )
    for parameter, gradient in first["gradients"].items():
        assert torch.equal(gradient, second["gradients"][parameter]), parameter
        assert gradient.isfinite().all(), parameter


@pytest.mark.parametrize(("name", "tasks"), [("CenterMask", ["bbox", "segm"]), ("FCOS", ["bbox"])])
def test_centermask_and_fcos_are_evaluated_with_test_time_augmentation(
    users_set, tmp_path, name, tasks
):
    """As for Detectron2's Mask R-CNN: results of flipped and resized images are merged."""
    augmentation = ("TEST.AUG.ENABLED", True, "TEST.AUG.MIN_SIZES", (48, 64))
    cfg = small_config(
        *(name, *augmentation, "DATASETS.TEST", ("shapes_val",)),
        *("DATASETS.SHAPES.VAL_IMAGES", 2, "OUTPUT_DIR", str(tmp_path)),
        *("MODEL.FCOS.SCORE_THRESH_TEST", 0.0),
    )
    setup_datasets(cfg)
    torch.manual_seed(0)
    model = Trainer.build_model(cfg)
    results = Trainer.test_with_augmentation(cfg, model)
    assert results.keys() == {f"{task}_TTA" for task in tasks}
    assert all(math.isfinite(results[f"{task}_TTA"]["AP"]) for task in tasks)
    found = json.loads((tmp_path / "inference_TTA/coco_instances_results.json").read_text())
    assert found and all(("segmentation" in x) == ("segm" in tasks) for x in found)


@pytest.mark.parametrize("name", ["SOLO", "DecoupledSOLO", "SOLOv2", "YOLACT", "AdaptIS"])
def test_models_without_test_time_augmentation_refuse_it(users_set, name):
    cfg = small_config(name, "TEST.AUG.ENABLED", True, "DATASETS.TRAIN", (users_set,))
    with pytest.raises(ValueError, match=r"TEST\.AUG\.ENABLED must be False: " + name):
        DefaultTrainer.build_model(cfg)


def test_detectron2s_checkpointer_reads_our_checkpoints(users_set, tmp_path):
    cfg = small_config("SOLO", "OUTPUT_DIR", str(tmp_path), "DATASETS.TEST", ())
    setup_datasets(cfg)
    trainer = Trainer(cfg)
    trainer.train()
    model = DefaultTrainer.build_model(cfg)
    DetectionCheckpointer(model).load(str(tmp_path / "model_final.pth"))
    for key, value in trainer.model.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key
