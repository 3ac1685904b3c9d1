"""Tiny configs that differ under MODEL only, and a report of a small comparison."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
import pytest
from PIL import Image

from solo_d2.evaluation import oracle

REPOSITORY = Path(__file__).resolve().parents[3]

METRICS = "AP AP50 AP75 APs APm APl AR1 AR10 AR100 ARs ARm ARl".split()
PARTS = {"preprocess": 0.1, "network": 0.6, "nms": 0.2, "output": 0.1}


def _stat(*values):
    spread = None if len(values) < 2 else float(np.std(values, ddof=1))
    return {"mean": sum(values) / len(values), "std": spread, "values": list(values)}


def _of_class(ap):
    found = {"AP": ap, "AP50": ap + 10, "AR100": ap + 5, "F1": 80.0, "threshold": 0.45}
    return {name: _stat(value) for name, value in found.items()}


def _times(seconds):
    return {"median": seconds, "q1": 0.9 * seconds, "q3": 1.1 * seconds, "mean": seconds}


def rectangle(height, width, x1, y1, x2, y2):
    """RLE of a mask that fills a box."""
    mask = np.zeros((height, width), dtype=np.uint8, order="F")
    mask[y1:y2, x1:x2] = 1
    rle = mask_util.encode(mask)
    return {"size": list(rle["size"]), "counts": rle["counts"].decode()}


def _model(name, architecture, ap, seconds):
    curve = [1 - (i / 100) ** 4 for i in range(101)]
    iterations = list(range(19, 400, 20))
    return {
        "name": name,
        "config": f"configs/{name}.yaml",
        "architecture": architecture,
        "weights": None,
        "status": "finished",
        "error": None,
        "seeds": [1, 2],
        "metrics": {t: {k: _stat(ap - 1, ap + 1) for k in METRICS} for t in ("segm", "bbox")},
        "per_class": {
            t: {"disc": _of_class(ap), "bar": _of_class(ap / 2)} for t in ("segm", "bbox")
        },
        "confusion": [[10, 1, 2], [0, 8, 3], [1, 2, 0]],
        "errors": {
            "as it is": {k: _stat(ap - 1, ap + 1) for k in oracle.METRICS},
            **{kind: dict.fromkeys(oracle.METRICS, _stat(ap / 9)) for kind in oracle.KINDS},
        },
        "rates": [],
        "notes": [],
        "parameters": 3_000_000,
        "flops": 1.5e9,
        "flops_post": 1e8,
        "detections": 12.0,
        "input_size": [128, 128],
        "latency": [
            {
                "batch": batch,
                "images": 30,
                "total": _times(seconds / batch**0.5),
                "parts": {p: _times(seconds / batch**0.5 * s) for p, s in PARTS.items()},
            }
            for batch in (1, 8)
        ],
        "training": {
            "iterations": 400,
            "seconds_per_iteration": _times(0.25),
            "step": _times(0.2),
        },
        "memory": {
            "device": "cpu",
            "baseline": 500_000_000,
            "inference": 620_000_000,
            "training": 900_000_000,
        },
        "training_curves": [
            {
                "seed": seed,
                "stage": None,
                "iteration": iterations,
                "losses": {
                    "total_loss": [3.0 / (i + 1) for i in iterations],
                    "loss_mask": [None, *(1.0 / i for i in iterations[1:])],
                },
                "validation": {"iteration": [200, 400], "segm/AP": [ap / 2, ap]},
            }
            for seed in (1, 2)
        ],
        "pr_curves": {t: {"all classes, IoU 0.5": curve, "disc": curve} for t in ("segm", "bbox")},
    }


def _gallery(folder: Path):
    entries = []
    for i in range(2):
        path = folder / f"image {i}.png"
        Image.fromarray(np.full((60, 80, 3), 90 + 40 * i, dtype=np.uint8)).save(path)
        disc = {"class": "disc", "rle": rectangle(60, 80, 10, 10, 40, 40), "iscrowd": False}
        found = {"class": "disc", "score": 0.9, "rle": rectangle(60, 80, 10, 12, 40, 40)}
        stray = {"class": "bar", "score": 0.1, "rle": rectangle(60, 80, 60, 40, 70, 55)}
        entries.append(
            {
                "file_name": str(path),
                "image_id": i,
                "disagreement": 0.5 - 0.1 * i,
                "ground_truth": [disc],
                "ious": {"alpha": 0.93, "beta": 0.0},
                "predictions": {"alpha": [found, stray], "beta": []},
            }
        )
    return entries


@pytest.fixture
def example_report(tmp_path):
    """Two finished models, "alpha" and "beta", of two seeds; the images are in ``tmp_path``."""
    models = [
        _model("alpha", "SOLOv2", 41.0, 0.030),
        _model("beta", "Mask R-CNN", 38.0, 0.045),
    ]
    report = {
        "created": "2026-01-02T03:04:05+00:00",
        "finished": True,
        "command": "solo-d2 compare alpha.yaml beta.yaml --train",
        "environment": {"Python": "3.11", "CPU": "a processor", "device": "cpu"},
        "settings": {"train": True, "seeds": [1, 2], "rates": [], "score_threshold": 0.3},
        "data": {
            "train": ["toys_train"],
            "test": ["toys_val"],
            "classes": ["disc", "bar"],
            "images": 20,
            "instances": 55,
            "images_train": 200,
        },
        "differences": [
            {
                "key": "MODEL.FPN.OUT_CHANNELS",
                "values": {"alpha": 64, "beta": None},
                "group": "backbone",
            }
        ],
        "models": models,
        "gallery": _gallery(tmp_path),
    }
    return copy.deepcopy(report)


# A fraction of a second for some iterations on one core.
BASE = """
_BASE_: {repository}/configs/quick/Base-shapes.yaml
MODEL:
  BACKBONE: {{NAME: "build_mobilenetv2_fpn_backbone"}}
  MOBILENETV2: {{WIDTH_MULT: 0.25, NORM: "BN"}}
  FPN: {{OUT_CHANNELS: 32}}
  SOLO: {{NUM_CONVS: 1, CONV_DIM: 32, NUM_GRIDS: [8, 6, 4], SCORE_THRESH_TEST: 0.0}}
DATASETS:
  SHAPES: {{TRAIN_IMAGES: 8, VAL_IMAGES: 3, IMAGE_SIZE: [64, 64]}}
INPUT: {{MIN_SIZE_TRAIN: [64], MIN_SIZE_TEST: 64}}
SOLVER: {{IMS_PER_BATCH: 2, BASE_LR: 0.001, WARMUP_ITERS: 2, MAX_ITER: 6, CHECKPOINT_PERIOD: 2}}
TEST: {{DETECTIONS_PER_IMAGE: 10, VIS_IMAGES: 0}}
DATALOADER: {{NUM_WORKERS: 0}}
SEED: 3
"""

LEAVES = {
    "solov2": """
MODEL:
  META_ARCHITECTURE: "SOLOv2"
  SOLOV2: {MASK_DIM: 32, MASK_CONV_DIM: 32}
""",
    "solo": 'MODEL: {META_ARCHITECTURE: "SOLO"}',
    # "stages": the same as solo, but in two parts
    "stage1": 'MODEL: {META_ARCHITECTURE: "SOLO"}\nSOLVER: {MAX_ITER: 4}',
    "stage2": 'MODEL: {META_ARCHITECTURE: "SOLO"}\nSOLVER: {MAX_ITER: 2, BASE_LR: 0.0005}',
    "mask_rcnn": """
MODEL:
  META_ARCHITECTURE: "GeneralizedRCNN"
  ANCHOR_GENERATOR: {SIZES: [[8], [16], [32]]}
  RPN:
    IN_FEATURES: ["p2", "p3", "p4"]
    PRE_NMS_TOPK_TRAIN: 50
    POST_NMS_TOPK_TRAIN: 20
    PRE_NMS_TOPK_TEST: 50
    POST_NMS_TOPK_TEST: 20
  ROI_HEADS:
    NAME: "StandardROIHeads"
    NUM_CLASSES: -1
    IN_FEATURES: ["p2", "p3", "p4"]
    BATCH_SIZE_PER_IMAGE: 16
  ROI_BOX_HEAD: {NAME: "FastRCNNConvFCHead", NUM_FC: 1, FC_DIM: 32, POOLER_RESOLUTION: 4}
  ROI_MASK_HEAD:
    NAME: "MaskRCNNConvUpsampleHead"
    NUM_CONV: 1
    CONV_DIM: 16
    POOLER_RESOLUTION: 7
""",
    "pointrend": """
_BASE_: "mask_rcnn.yaml"
MODEL:
  ROI_MASK_HEAD:
    NAME: "PointRendMaskHead"
    POOLER_TYPE: ""
    IN_FEATURES: ["p2"]
    FC_DIM: 16
    NUM_FC: 1
    POOLER_RESOLUTION: 14
    POINT_HEAD_ON: True
  POINT_HEAD: {NUM_CLASSES: -1, IN_FEATURES: ["p2"], FC_DIM: 16, NUM_FC: 1}
""",
}


@pytest.fixture(scope="session", autouse=True)
def shapes_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOLO_D2_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def tiny_configs(tmp_path_factory) -> dict[str, str]:
    """Name -> yaml file."""
    folder = tmp_path_factory.mktemp("configs")
    (folder / "base.yaml").write_text(BASE.format(repository=REPOSITORY))
    files = {name: folder / f"{name}.yaml" for name in LEAVES}
    for name, file in files.items():
        base = "" if "_BASE_" in LEAVES[name] else "_BASE_: base.yaml\n"
        file.write_text(base + LEAVES[name])
    return {name: str(file) for name, file in files.items()}
