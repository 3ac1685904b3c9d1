"""Turn a published checkpoint into one of ours: ``python -m solo_d2 convert``."""

import argparse
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from torch import Tensor

from solo_d2 import add_solo_d2_config
from solo_d2.errors import UserError, one_line
from solo_d2.files import atomic_write
from solo_d2.modeling.num_classes import get_value, num_classes_keys

from .architecture import infer_config
from .load import load_weights_file
from .rename_rules import convert, recognize
from .sources import SOURCES, Source

_FORMATS = [name for name, source in SOURCES.items() if source.architecture]


def convert_checkpoint(
    weights: Mapping[str, Tensor], source: Source, cfg: CfgNode
) -> dict[str, Tensor]:
    """Rename the tensors and compare them, one by one, with those of the model of ``cfg``.

    Args:
        weights: a published state dict.
        source: its layout.
        cfg: of the model that it is for; see ``config_for``.

    Raises:
        UserError: tensors are unused or missing, or have another shape; all are named.
    """
    converted = convert(weights, source)
    with torch.device("meta"):  # names and shapes only: no memory, no time
        cfg = cfg.clone()
        cfg.defrost()
        cfg.MODEL.DEVICE = "meta"
        expected = build_model(cfg).state_dict()
    for name in list(expected):
        if name not in converted and any(re.fullmatch(p, name) for p in source.lacking):
            del expected[name]
    check_complete(converted, expected)
    return {name: tensor.contiguous() for name, tensor in converted.items()}


def check_complete(converted: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Compare names and shapes; counters of batches may be missing, no inference reads them.

    Raises:
        UserError: naming every tensor that is unused, missing or of another shape.
    """
    missing = [
        name
        for name in expected
        if name not in converted and not name.endswith(".num_batches_tracked")
    ]
    unused = [name for name in converted if name not in expected]
    shapes = [
        f"{name} is {tuple(tensor.shape)}, the model has {tuple(expected[name].shape)}"
        for name, tensor in converted.items()
        if name in expected and tensor.shape != expected[name].shape
    ]
    found = {"missing": missing, "unused": unused, "of another shape": shapes}
    complaints = [f"{what}: {', '.join(names)}" for what, names in found.items() if names]
    if complaints:
        raise UserError("; ".join(complaints))


def config_for(weights: Mapping[str, Tensor], source: Source) -> CfgNode:
    """The config that the shapes of a published state dict, and its layout, tell.

    Raises:
        UserError: see ``infer_config``.
    """
    shapes = {name: tuple(t.shape) for name, t in convert(weights, source).items()}
    keys = {**infer_config(source.architecture or "", shapes), **source.settings}
    cfg = _default_config()
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ()  # the classes are those of the weights
    for key, value in keys.items():
        cfg.merge_from_list([key, value])
    return cfg


def read_config(path: str) -> CfgNode:
    """A config file over the defaults of Detectron2 and solo_d2.

    Raises:
        UserError: it cannot be read, or has an unknown key.
    """
    cfg = _default_config()
    try:
        cfg.merge_from_file(path)
    except (OSError, KeyError, ValueError, AssertionError, yaml.YAMLError) as error:
        raise UserError(f"config {path}: {one_line(error)}") from error
    return cfg


def differing_settings(cfg: CfgNode, source: Source) -> dict[str, Any]:
    """Keys that the weights need and that ``cfg`` has otherwise, with the value needed."""
    return {key: need for key, need in source.settings.items() if get_value(cfg, key) != need}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 0, or 1 after an error of one line."""
    options = _parser().parse_args(arguments)
    try:
        _run(options)
    except (UserError, OSError, ValueError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 1
    return 0


def _run(options: argparse.Namespace) -> None:
    weights = load_weights_file(options.source, allow_pickle=options.allow_pickle)["model"]
    try:
        source = _source(weights, options.source_format)
        inferred = config_for(weights, source)
        cfg = inferred
        if options.config_file:
            cfg = read_config(options.config_file)
            if cfg.MODEL.META_ARCHITECTURE != source.architecture:
                raise UserError(
                    f"is of architecture {source.architecture}, {options.config_file} of "
                    f"{cfg.MODEL.META_ARCHITECTURE}"
                )
            # the weights, not a data set that may not be here, tell the number of classes
            cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ()
            for key in num_classes_keys(cfg):
                cfg.merge_from_list([key, get_value(inferred, key)])
        converted = convert_checkpoint(weights, source, cfg)
    except UserError as error:
        raise UserError(f"{options.source}: {error}") from error
    checkpoint = {
        "model": converted,
        "solo_d2": {
            "source": Path(options.source).name,
            "format": source.name,
            "architecture": source.architecture,
        },
    }
    with atomic_write(options.output) as file:
        torch.save(checkpoint, file)
    print(f"{options.source}: layout {source.name}, {_size(weights)}")
    print(f"{options.output}: {_size(converted)}; all used, none missing")
    if not options.config_file:
        print("Config keys that these weights need, beside Detectron2's and solo_d2's defaults:")
        print("\n".join(f"  {key} {value}" for key, value in _changes(inferred)))
        return
    print(f"{options.config_file} has a place for each of them")
    for key, value in differing_settings(cfg, source).items():
        have = get_value(cfg, key)
        print(
            f"warning: {options.config_file} has {key} {have}, weights of this source were "
            f"published for {value}",
            file=sys.stderr,
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m solo_d2 convert", description=__doc__.splitlines()[0]
    )
    parser.add_argument("source", help="a published .pth file")
    parser.add_argument("output", help="the .pth file to write")
    parser.add_argument(
        "--source-format",
        choices=["auto", *_FORMATS],
        default="auto",
        help="whose names the file has; auto (the default) recognizes them",
    )
    parser.add_argument(
        "--config-file",
        help="compare with the model of this config instead of the one that the shapes tell",
    )
    parser.add_argument(
        "--allow-pickle",
        action="store_true",
        help="load a file that may run code; only if you trust whom it is from",
    )
    return parser


def _source(weights: Mapping[str, Tensor], name: str) -> Source:
    source = recognize(weights) if name == "auto" else SOURCES[name]
    if source is None:
        raise UserError(f"its names are of none of the layouts {', '.join(_FORMATS)}")
    if source.architecture is None:
        raise UserError(
            f"holds a backbone alone ({source.name}); it needs no conversion, give it to "
            "MODEL.WEIGHTS"
        )
    return source


def _default_config() -> CfgNode:
    cfg = get_cfg()
    add_solo_d2_config(cfg)
    return cfg


def _changes(cfg: CfgNode) -> Iterator[tuple[str, Any]]:
    """Keys under MODEL and INPUT whose value is not the default."""
    default = _default_config()

    def walk(node: CfgNode, prefix: str) -> Iterator[tuple[str, Any]]:
        for name, value in node.items():
            key = f"{prefix}.{name}"
            if isinstance(value, CfgNode):
                yield from walk(value, key)
            elif value != get_value(default, key):
                yield key, value

    yield from walk(cfg.MODEL, "MODEL")
    yield from walk(cfg.INPUT, "INPUT")


def _size(weights: Mapping[str, Tensor]) -> str:
    return f"{len(weights)} tensors, {sum(t.numel() for t in weights.values()):,} numbers"


if __name__ == "__main__":
    sys.exit(main())
