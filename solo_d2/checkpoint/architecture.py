"""Finding the packaged configs whose models have the tensors of a file."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model

from solo_d2.config import load_config
from solo_d2.model_zoo import config_names, get_config_file
from solo_d2.modeling.num_classes import get_value, num_classes_keys
from solo_d2.modeling.own_keys import all_keys_honored

Shapes = Mapping[str, tuple[int, ...]]


class Match(NamedTuple):
    """How well the model of a packaged config fits, with the number of classes that fits best."""

    name: str
    num_classes: int
    differences: int  # tensors that are missing, unused, or of another shape

    def config(self) -> CfgNode:
        return config_with_classes(load_config(self.name), self.num_classes)


def match_configs(
    shapes: Shapes,
    architecture: str,
    *,
    lacking: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
) -> list[Match]:
    """The packaged configs that fit a state dict, or the closest one if none fits.

    Args:
        shapes: shapes of the state dict, under our names.
        architecture: the meta-architecture.
        lacking: patterns for whole names that the state dict may lack.
        settings: config keys and values. Configs with other values are returned only if no config
            with these values fits.
    """
    configs = _configs(architecture)
    same = [name for name, cfg in configs.items() if not differing_settings(cfg, settings or {})]
    for group in (same, configs):
        extra = {
            name: sum(map(len, differing_names(shapes, packaged_shapes(name, 2), lacking)))
            for name in group
        }
        fewest = min(extra.values(), default=0)
        nearest = [_match(name, shapes, fewest) for name in group if extra[name] == fewest]
        if exact := [match for match in nearest if not match.differences]:
            return exact
    return sorted(nearest, key=lambda match: match.differences)[:1]


def differing_names(
    shapes: Shapes, model: Shapes, lacking: Sequence[str]
) -> tuple[list[str], list[str]]:
    """Names of the model that a state dict lacks, other than ``lacking``, and those it has more."""
    optional = re.compile("|".join(lacking) or "(?!)")
    missing = [name for name in model if name not in shapes and not optional.fullmatch(name)]
    return missing, [name for name in shapes if name not in model]


def differing_settings(cfg: CfgNode, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings for which ``cfg`` has other values."""
    return {key: value for key, value in settings.items() if get_value(cfg, key) != value}


def fit_num_classes(cfg: CfgNode, shapes: Shapes) -> int:
    """The number of classes with which most tensors have the same shape in the model of ``cfg``."""
    two, three = (model_shapes(config_with_classes(cfg, number)) for number in (2, 3))
    return _fit(shapes, two, three)[0]


def config_with_classes(cfg: CfgNode, num_classes: int) -> CfgNode:
    """A copy with this number of classes, regardless of the data sets it names."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ()
    for key in num_classes_keys(cfg):
        cfg.merge_from_list([key, num_classes])
    return cfg


def model_shapes(cfg: CfgNode) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a model's state dict, from a model on the meta device."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"), all_keys_honored():
        state = build_model(cfg).state_dict()
    return {
        name: tuple(tensor.shape)
        for name, tensor in state.items()
        if not name.endswith(".num_batches_tracked")
    }


@cache
def _configs(architecture: str) -> dict[str, CfgNode]:
    files = {name: CfgNode.load_yaml_with_base(get_config_file(name)) for name in config_names()}
    return {
        name: load_config(name)
        for name, content in files.items()
        if content["MODEL"]["META_ARCHITECTURE"] == architecture
    }


@cache
def packaged_shapes(name: str, num_classes: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the model of a packaged config."""
    return model_shapes(config_with_classes(load_config(name), num_classes))


def _match(name: str, shapes: Shapes, differing_names: int) -> Match:
    number, wrong = _fit(shapes, packaged_shapes(name, 2), packaged_shapes(name, 3))
    return Match(name, number, differing_names + wrong)


def _fit(shapes: Shapes, two: Shapes, three: Shapes) -> tuple[int, int]:
    """Compare with a model's shapes for 2 and 3 classes, which show how they depend on the number.

    Returns:
        The number of classes that explains most of the shapes, and how many it does not explain.
    """
    explained = Counter(  # number of classes -> tensors
        num_classes_of(shapes[key], two[key], three[key])
        for key in two.keys() & shapes.keys()
        if shapes[key] != two[key] or two[key] != three[key]
    )
    never = explained.pop(None, 0)
    number, fitting = max(explained.items(), key=lambda item: item[1], default=(2, 0))
    return number or 0, never + sum(explained.values()) - fitting


def num_classes_of(
    shape: tuple[int, ...], two: tuple[int, ...], three: tuple[int, ...]
) -> int | None:
    """The number of classes for which a tensor has this shape; None if there is none."""
    if len(shape) != len(two):
        return None
    found = set()
    for size, size2, size3 in zip(shape, two, three):
        if size2 != size3:
            steps, rest = divmod(size - size2, size3 - size2)
            found.add(None if rest or steps < -1 else 2 + steps)
        elif size != size2:
            return None
    return found.pop() if len(found) == 1 else None
