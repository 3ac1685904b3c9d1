"""Every config merges and builds, and the published ones have the published sizes."""

from pathlib import Path

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model

from solo_d2 import add_solo_d2_config
from solo_d2.config import load_config
from solo_d2.modeling.num_classes import num_classes_keys
from solo_d2.tools.compare.fairness import find_differences
from solo_d2.tools.compare.runs import read_models

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
YAMLS = sorted(str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*.yaml"))
LEAVES = [name for name in YAMLS if not Path(name).name.startswith("Base-")]


def load(name):
    return load_config(str(CONFIGS / name))


def build(cfg, num_classes):
    """Build on the meta device: no memory, no initial values, and no data set is needed."""
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ()
    for key in num_classes_keys(cfg):
        cfg.merge_from_list([key, num_classes])
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        return build_model(cfg)


@pytest.mark.parametrize("name", YAMLS)
def test_config_has_known_keys_only(name):
    cfg = load(name)
    assert cfg.VERSION == 2
    cfg.freeze()


def test_unknown_key_fails_and_is_named(tmp_path):
    path = tmp_path / "typo.yaml"
    path.write_text("MODEL:\n  SOLO:\n    NUM_CLASES: 3\nVERSION: 2\n")
    cfg = get_cfg()
    add_solo_d2_config(cfg)
    with pytest.raises(KeyError, match=r"MODEL\.SOLO\.NUM_CLASES"):
        cfg.merge_from_file(str(path))


@pytest.mark.parametrize("name", LEAVES)
def test_config_builds(name):
    cfg = load(name)
    model = build(cfg, num_classes=3)
    assert type(model).__name__ == cfg.MODEL.META_ARCHITECTURE
    assert sum(p.requires_grad for p in model.parameters()) > 0


# Numbers in the published checkpoints, in millions (../shared/reference: solov2.md, section 11, and
# solo.md, section 8).
@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("SOLOv2/SOLOv2_R50_1x", 46.65),
        ("SOLOv2/SOLOv2_R50_3x", 46.65),
        ("SOLOv2/SOLOv2_R50_3x_official", 46.65),
        ("SOLOv2/SOLOv2_Light_448_R50_3x", 31.39),
        ("SOLOv2/SOLOv2_Light_448_R18_3x", 18.28),
        ("SOLOv2/SOLOv2_Light_512_DCN_R50_3x", 33.24),
        ("SOLOv2/SOLOv2_R101_DCN_3x", 68.83),
        ("SOLO/SOLO_R50_3x", 36.35),
        ("SOLO/DecoupledSOLO_R50_3x", 40.08),
        ("SOLO/DecoupledSOLO_Light_512_R50_3x", 32.41),
        ("SOLO/DecoupledSOLO_Light_512_DCN_R50_3x", 33.07),
    ],
)
def test_published_variant_has_the_published_size(name, millions):
    state = build(load(f"{name}.yaml"), num_classes=80).state_dict()
    numbers = sum(v.numel() for k, v in state.items() if not k.endswith("num_batches_tracked"))
    assert round(numbers / 1e6, 2) == pytest.approx(millions, abs=0.011)


@pytest.mark.parametrize("folder", sorted(p.parent.name for p in CONFIGS.glob("*/README.md")))
def test_every_config_is_in_the_table_of_its_folder(folder):
    table = (CONFIGS / folder / "README.md").read_text(encoding="utf-8")
    for name in LEAVES:
        if name.startswith(f"{folder}/"):
            assert f"({Path(name).name})" in table, name


@pytest.mark.parametrize(
    ("folder", "suffix"),
    [("quick", "shapes"), ("pennfudan", "mobilenetv2"), ("nuclei", "mobilenetv2")],
)
def test_the_small_models_of_a_data_set_can_be_compared(folder, suffix):
    names = ["mask_rcnn", "centermask", "yolact", "solo", "decoupled_solo", "solov2"]
    if folder == "quick":
        names.append("pointrend")
    words = [f"{CONFIGS}/{folder}/{name}_{suffix}.yaml" for name in names]
    stages = [f"{CONFIGS}/{folder}/adaptis_{suffix}_stage{i}.yaml" for i in (1, 2)]
    models = read_models([*words, "+".join(stages)], opts=["SOLVER.BASE_LR", "0.002"])
    differences = find_differences({x.name: x.cfgs for x in models}, training=True)
    assert [x.key for x in differences if not x.allowed] == []
