"""A toy model and small configs for the tests of training."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import Boxes, Instances
from torch import nn

from solo_d2 import add_solo_d2_config
from solo_d2.data import setup_datasets

REPOSITORY = Path(__file__).resolve().parents[2]


@META_ARCH_REGISTRY.register()
class ToySegmentor(nn.Module):
    """Two losses that depend on the images alone; one prediction per image."""

    def __init__(self, cfg: CfgNode):
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, batch):
        colors = torch.stack([x["image"].float().mean(dim=(1, 2)) / 255 for x in batch])
        out = self.layer(colors)
        if self.training:
            self.steps += 1
            return {
                "loss_a": (out[:, 0] - 1).square().mean(),
                "loss_b": (out[:, 1] - colors[:, 0]).square().mean(),
            }
        results = []
        for x, scores in zip(batch, out.sigmoid()):
            size = x["height"], x["width"]
            instances = Instances(size)
            instances.scores = scores[:1]
            instances.pred_classes = torch.zeros(1, dtype=torch.long)
            instances.pred_masks = torch.ones(1, *size, dtype=torch.bool)
            instances.pred_boxes = Boxes(torch.tensor([[0.0, 0.0, size[1], size[0]]]))
            results.append({"instances": instances})
        return results


@pytest.fixture(scope="session", autouse=True)
def shapes_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOLO_D2_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def train_net():
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("train_net", REPOSITORY / "train_net.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_net"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def toy_cfg(tmp_path):
    """(KEY, VALUE, ...) -> config of the toy model on 12 small images, data registered."""

    def make(*overrides) -> CfgNode:
        cfg = get_cfg()
        add_solo_d2_config(cfg)
        settings = [
            *("MODEL.META_ARCHITECTURE", "ToySegmentor", "MODEL.DEVICE", "cpu"),
            *("DATASETS.TRAIN", ("shapes_train",), "DATASETS.TEST", ("shapes_val",)),
            *("DATASETS.SHAPES.TRAIN_IMAGES", 12, "DATASETS.SHAPES.VAL_IMAGES", 3),
            *("DATASETS.SHAPES.IMAGE_SIZE", (48, 64)),
            *("INPUT.MIN_SIZE_TRAIN", (48,), "INPUT.MIN_SIZE_TEST", 48),
            *("INPUT.MASK_FORMAT", "bitmask"),
            *("SOLVER.IMS_PER_BATCH", 2, "SOLVER.BASE_LR", 0.1, "SOLVER.WARMUP_ITERS", 3),
            *("SOLVER.MAX_ITER", 12, "SOLVER.STEPS", (9,), "SOLVER.CHECKPOINT_PERIOD", 5),
            *("DATALOADER.NUM_WORKERS", 0, "TEST.VIS_IMAGES", 0, "MODEL.MASK_ON", True),
            *("OUTPUT_DIR", str(tmp_path / "output")),
        ]
        cfg.merge_from_list([*settings, *overrides])
        setup_datasets(cfg)
        return cfg

    return make


# A few seconds for some dozen iterations on one core.
TINY_SOLOV2 = """
_BASE_: {base}
MODEL:
  RESNETS: {{NORM: "FrozenBN"}}
  FPN: {{OUT_CHANNELS: 32}}
  SOLO: {{NUM_CONVS: 1, CONV_DIM: 64, NUM_GRIDS: [8, 6, 4], SCORE_THRESH_TEST: 0.0}}
  SOLOV2: {{MASK_DIM: 64, MASK_CONV_DIM: 64}}
DATASETS:
  SHAPES: {{TRAIN_IMAGES: 16, VAL_IMAGES: 3, IMAGE_SIZE: [64, 64]}}
INPUT: {{MIN_SIZE_TRAIN: [32], MIN_SIZE_TEST: 32, CROP: {{ENABLED: False}}}}
SOLVER:
  IMS_PER_BATCH: 2
  BASE_LR: 0.001
  LR_SCHEDULER_NAME: "WarmupMultiStepLR"
  STEPS: (30,)
  WARMUP_ITERS: 10
  MAX_ITER: 40
  CHECKPOINT_PERIOD: 10
TEST: {{EVAL_PERIOD: 15, VIS_IMAGES: 2, DETECTIONS_PER_IMAGE: 5}}
DATALOADER: {{NUM_WORKERS: 0}}
SEED: 3
VERSION: 2
"""


@pytest.fixture(scope="session")
def tiny_solov2_config(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("config") / "tiny_solov2.yaml"
    path.write_text(TINY_SOLOV2.format(base=REPOSITORY / "configs/quick/solov2_shapes.yaml"))
    return str(path)


class Process:
    """A script in its own process, with one thread; what it prints goes to a file."""

    def __init__(self, folder: Path, script: str, *arguments: str):
        self.log = folder / "printed.txt"
        with open(self.log, "w") as log:
            self.popen = subprocess.Popen(
                [sys.executable, str(REPOSITORY / script), *arguments],
                cwd=REPOSITORY,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def end(self, expected_code: int = 0) -> str:
        """Wait for the end; returns what was printed."""
        code = self.popen.wait(timeout=300)
        output = self.log.read_text()
        assert code == expected_code, output[-3000:]
        return output


@pytest.fixture(scope="session")
def start_process(shapes_cache, tmp_path_factory):
    """(script, *arguments) -> a ``Process``."""

    def start(script: str, *arguments: str) -> Process:
        return Process(tmp_path_factory.mktemp("process"), script, *arguments)

    return start
