"""Tiny configs that differ under MODEL only."""

from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]

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
        file.write_text("_BASE_: base.yaml\n" + LEAVES[name])
    return {name: str(file) for name, file in files.items()}
