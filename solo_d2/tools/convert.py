"""Convert a published checkpoint for solo_d2: ``solo-d2 convert``."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from solo_d2.arguments import parse, print_error
from solo_d2.checkpoint.architecture import config_with_classes, differing_settings
from solo_d2.checkpoint.convert import convert_checkpoint, find_configs, num_classes_for
from solo_d2.checkpoint.load import load_weights_file
from solo_d2.checkpoint.rename_rules import recognize
from solo_d2.checkpoint.sources import SOURCES, Source
from solo_d2.config import load_config
from solo_d2.errors import UserError
from solo_d2.files import atomic_write
from solo_d2.modeling.num_classes import get_value

_FORMATS = [name for name, source in SOURCES.items() if source.architecture]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 0, or 1 after an error of one line."""
    options = parse(_parser(), arguments)
    try:
        _run(options)
    except Exception as error:
        print_error(error, options)
        return 1
    return 0


def _run(options: argparse.Namespace) -> None:
    if options.opts and not options.config_file:
        raise UserError(f"{options.opts[0]}: KEY VALUE pairs need a --config-file")
    weights = load_weights_file(options.source, allow_pickle=options.allow_pickle)["model"]
    try:
        source = _source(weights, options.source_format)
        if options.config_file:
            names = [options.config_file]
            cfg = load_config(options.config_file, opts=options.opts)
            if cfg.MODEL.META_ARCHITECTURE != source.architecture:
                raise UserError(
                    f"is of architecture {source.architecture}, {options.config_file} of "
                    f"{cfg.MODEL.META_ARCHITECTURE}"
                )
            num_classes = num_classes_for(weights, source, cfg)
            cfg = config_with_classes(cfg, num_classes)
        else:
            matches = find_configs(weights, source)
            names, num_classes = [match.name for match in matches], matches[0].num_classes
            cfg = matches[0].config()
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
    print(f"Configs for these weights, of {num_classes} classes: {', '.join(names)}")
    if len(names) > 1:
        print(
            "They differ in what the weights do not show, such as the image size or the schedule."
        )
    for key, value in differing_settings(cfg, source.settings).items():
        print(
            f"warning: {names[0]} has {key} {get_value(cfg, key)}, weights of this source were "
            f"published for {value}",
            file=sys.stderr,
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="solo-d2 convert",
        usage="%(prog)s SOURCE OUTPUT [options] [--config-file YAML [KEY VALUE ...]]",
        description="Turn a published checkpoint into one of solo_d2.",
    )
    parser.add_argument("source", help="a published checkpoint")
    parser.add_argument("output", help="the .pth file to write")
    parser.add_argument(
        "--source-format",
        choices=["auto", *_FORMATS],
        default="auto",
        help="the layout of the file's tensor names; auto (the default) recognizes it",
    )
    parser.add_argument(
        "--config-file",
        help="compare with the model of this config instead of finding a packaged one that fits",
    )
    parser.add_argument(
        "--allow-pickle",
        action="store_true",
        help="load a file that may run code; only if you trust its source",
    )
    return parser


def _source(weights: Mapping[str, Tensor], name: str) -> Source:
    source = recognize(weights) if name == "auto" else SOURCES[name]
    if source is None:
        raise UserError(f"its names match none of the layouts {', '.join(_FORMATS)}")
    if source.architecture is None:
        raise UserError(
            f"holds only a backbone ({source.name}); it needs no conversion, set MODEL.WEIGHTS to "
            "this file"
        )
    return source


def _size(weights: Mapping[str, Tensor]) -> str:
    return f"{len(weights)} tensors, {sum(t.numel() for t in weights.values()):,} numbers"


if __name__ == "__main__":
    sys.exit(main())
