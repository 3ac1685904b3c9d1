"""The packaged configs, and that the published figures agree with the tables in configs/."""

import re
from pathlib import Path

import pytest
import yaml

from solo_d2 import get_config_file, list_models, model_zoo
from solo_d2.config import load_config
from solo_d2.errors import UserError

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
PUBLISHED = ["SOLO", "SOLOv2", "YOLACT", "CenterMask", "MaskRCNN"]


def published_ap(folder):
    """Config -> mask AP, box AP and PQ of its first row in the folder's table, as text."""
    readme = (CONFIGS / folder / "README.md").read_text(encoding="utf-8")
    table = readme.split("\n## Published")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in x.split("|")] for x in table.splitlines() if x[:1] == "|"]
    header = rows[0]
    mask = header.index("mask AP" if "mask AP" in header else "AP")
    others = [header.index(x) if x in header else None for x in ("box AP", "PQ")]
    found = {}
    for row in rows[2:]:
        name = f"{folder}/{re.search(r'[(](.+[.]yaml)[)]', row[1])[1]}"
        found.setdefault(name, (row[mask], *(row[i] if i else "" for i in others)))
    return found


@pytest.mark.parametrize("folder", PUBLISHED)
def test_figures_are_those_of_the_tables(folder):
    table = published_ap(folder)
    models = {x.config: x for x in list_models() if x.config.startswith(f"{folder}/")}
    assert set(table) == set(models)
    for name, cells in table.items():
        published = (models[name].mask_ap, models[name].box_ap, models[name].pq)
        for cell, ap in zip(cells, published):
            in_table = float(cell) if re.fullmatch(r"\d\d\.\d", cell) else None
            assert ap == in_table, name


def test_each_published_model_has_its_repository_and_page():
    for model in list_models():
        measured = model.mask_ap or model.pq
        assert (measured is None) == (model.repository is None), model.config
        if model.repository:
            assert re.fullmatch(r"https://github\.com/[\w-]+/[\w-]+", model.repository)
        if model.weights_page:
            assert model.weights_page.startswith(model.repository)


def test_every_entry_of_the_data_file_is_used():
    zoo = yaml.safe_load(Path(model_zoo.__file__).with_suffix(".yaml").read_text())
    assert set(zoo["models"]) <= set(model_zoo.config_names())
    assert {entry["source"] for entry in zoo["models"].values()} == set(zoo["sources"])


def test_all_whole_configs_are_listed():
    leaves = {
        str(path.relative_to(CONFIGS))
        for path in CONFIGS.rglob("*.yaml")
        if not path.name.startswith("Base-")
    }
    assert {model.config for model in list_models()} == leaves


def test_a_base_has_a_path_too_and_nothing_outside_of_the_folder():
    base = get_config_file("SOLOv2/Base-SOLOv2.yaml")
    assert load_config(base).MODEL.META_ARCHITECTURE == "SOLOv2"
    for name in ("../configs/SOLOv2/Base-SOLOv2.yaml", "SOLOv2/README.md", "SOLOv2", ""):
        with pytest.raises(UserError):
            get_config_file(name)
