"""What the command lines of all tools have in common."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

# Detectron2's config; those of solo_d2 are below the same.
CONFIG_ROOTS = frozenset(
    "CUDNN_BENCHMARK DATALOADER DATASETS FLOAT32_PRECISION GLOBAL INPUT MODEL OUTPUT_DIR SEED "
    "SOLVER TEST VERSION VIS_PERIOD".split()
)


def parse(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None
) -> argparse.Namespace:
    """Parse options, inputs and KEY VALUE pairs in any order.

    Args:
        parser: for the options. If it has a positional argument "inputs" with nargs="*", words
            that belong to nothing else are added to it.
        arguments: by default those of the command line.

    Returns:
        Its values, and under ``opts`` the keys and values of the config in turn.
    """
    opts, words = split_overrides(sys.argv[1:] if arguments is None else arguments)
    if len(opts) % 2:
        parser.error(f"config key {opts[-1]} has no value")
    options, rest = parser.parse_known_args(words)
    # A parser of Detectron2 has "opts" of its own, which gets what is no option.
    options.opts = opts + list(getattr(options, "opts", None) or [])
    if rest and hasattr(options, "inputs") and not any(word.startswith("-") for word in rest):
        options.inputs += rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return options


def split_overrides(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """(config keys, each with the word that follows it; all other words).

    A key is a word that begins with the name of a config section, and is not a file. The last one
    has no value if none follows, or an option.
    """
    opts: list[str] = []
    others: list[str] = []
    remaining = list(words)
    while remaining:
        word = remaining.pop(0)
        if word.split(".")[0] not in CONFIG_ROOTS or Path(word).exists():
            others.append(word)
        elif not remaining or remaining[0].startswith("--"):
            return [*opts, word], [*others, *remaining]
        else:
            opts += [word, remaining.pop(0)]
    return opts, others


def add_model_arguments(
    parser: argparse.ArgumentParser,
    *,
    config_required: bool = True,
    weights_help: str = "default: MODEL.WEIGHTS of the config",
) -> None:
    """Add the options --config-file, --weights and --allow-pickle."""
    parser.add_argument(
        "--config-file",
        required=config_required,
        default="",
        metavar="YAML",
        help="a file, or the name of a packaged config such as SOLOv2/SOLOv2_R50_3x.yaml",
    )
    parser.add_argument("--weights", default="", metavar="FILE", help=weights_help)
    parser.add_argument(
        "--allow-pickle",
        action="store_true",
        help="load weights that can run code; only for files that you trust",
    )
