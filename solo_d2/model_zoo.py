"""The packaged configs by name, and what their authors published."""

import difflib
from pathlib import Path
from typing import NamedTuple

import yaml

from .errors import UserError

# In the wheel configs/ is inside the package; in a clone it is beside it.
_HERE = Path(__file__).resolve().parent
_CONFIGS = next((f for f in (_HERE / "configs", _HERE.parent / "configs") if f.is_dir()), _HERE)


class ZooModel(NamedTuple):
    """A packaged config. Values that were not published are None."""

    config: str  # for get_config_file and --config-file
    mask_ap: float | None
    box_ap: float | None
    pq: float | None  # panoptic quality
    data: str | None  # on which the AP was measured
    repository: str | None
    weights_page: str | None  # where the authors offer the weights, a file for "convert"


def get_config_file(name: str) -> str:
    """Path of a packaged config, for example "SOLOv2/SOLOv2_R50_3x.yaml".

    Raises:
        UserError: there is no such config; the message names similar ones.
    """
    path = _CONFIGS / name
    if path.suffix == ".yaml" and ".." not in path.parts and path.is_file():
        return str(path)
    similar = difflib.get_close_matches(name, config_names(), n=3, cutoff=0.4)
    hint = f"; similar names: {', '.join(similar)}" if similar else ""
    raise UserError(f"no config file {name}, here or in the package{hint}")


def config_names() -> list[str]:
    """Names of the packaged configs, without those that only serve as bases of others."""
    files = _CONFIGS.glob("*/*.yaml")
    return sorted(f"{f.parent.name}/{f.name}" for f in files if not f.name.startswith("Base-"))


def list_models() -> list[ZooModel]:
    """Every packaged config with its published AP and the page that offers the weights."""
    zoo = yaml.safe_load((_HERE / "model_zoo.yaml").read_text(encoding="utf-8"))
    models = []
    for name in config_names():
        published = zoo["models"].get(name, {})
        source = zoo["sources"].get(published.get("source"), {})
        models.append(
            ZooModel(
                config=name,
                mask_ap=published.get("mask_ap"),
                box_ap=published.get("box_ap"),
                pq=published.get("pq"),
                data=source.get("data"),
                repository=source.get("repository"),
                weights_page=source.get("weights_page"),
            )
        )
    return models
