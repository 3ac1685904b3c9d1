"""Small configs and processes for the tests of training."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from detectron2.config import CfgNode, get_cfg

from solo_d2 import add_solo_d2_config
from solo_d2.data import setup_datasets
from solo_d2.tools import train

REPOSITORY = Path(__file__).resolve().parents[2]


def load_script(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


toy = load_script(Path(__file__).with_name("toy.py"))


@pytest.fixture(scope="session", autouse=True)
def shapes_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOLO_D2_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def train_net():
    """The module behind the script and ``solo-d2 train``."""
    return train


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


@pytest.fixture
def toy_model():
    return toy.ToySegmentor


@pytest.fixture(scope="session")
def toy_arm():
    """(moment) -> None: this process will be killed at that moment."""
    return toy.arm


class Process:
    """A script in its own process, with one thread; its output goes to a file."""

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
        """Wait for the end; returns the output."""
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
