"""Command-line arguments that all tools share."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import UnsafeFileError, UserError, is_user_error, one_line

if TYPE_CHECKING:
    from .predictor import Predictor

# Sections of Detectron2's config; the keys of solo_d2 are in the same sections.
CONFIG_ROOTS = frozenset(
    "CUDNN_BENCHMARK DATALOADER DATASETS FLOAT32_PRECISION GLOBAL INPUT MODEL OUTPUT_DIR SEED "
    "SOLVER TEST VERSION VIS_PERIOD".split()
)


def parse(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None
) -> argparse.Namespace:
    """Parse options, inputs and KEY VALUE pairs in any order.

    Args:
        parser: defines the options. If it has a positional argument "inputs" with nargs="*",
            leftover words are added to it.
        arguments: the words to parse; by default those of the command line.

    Returns:
        The parsed options. ``opts`` lists config keys, each followed by its value.
    """
    opts, words = split_overrides(sys.argv[1:] if arguments is None else arguments)
    if len(opts) % 2:
        parser.error(f"config key {opts[-1]} has no value")
    options, rest = parser.parse_known_args(words)
    # Detectron2's parser has its own "opts", which collects the words that are not options.
    options.opts = opts + list(getattr(options, "opts", None) or [])
    if rest and hasattr(options, "inputs") and not any(word.startswith("-") for word in rest):
        options.inputs += rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return options


def print_error(error: Exception, options: argparse.Namespace) -> None:
    """Say on one line what the user can mend; any other error is raised again.

    Args:
        error: that ended the command.
        options: of the command, to name the one that helps, if it has that.
    """
    if not is_user_error(error):
        raise error
    hint = ""
    if isinstance(error, UnsafeFileError) and hasattr(options, "allow_pickle"):
        hint = "; if you trust the file, add --allow-pickle"
    print(f"error: {one_line(error)}{hint}", file=sys.stderr)


def split_overrides(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """(config keys, each followed by its value; all other words).

    A key is a word that begins with the name of a config section and is not an existing file. The
    last key has no value if no word or an option follows it.
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
        help="load weights that may run code; only for files that you trust",
    )


def load_predictor(options: argparse.Namespace, **more: Any) -> "Predictor":
    """The model that the options of ``add_model_arguments`` and the KEY VALUE pairs name.

    Args:
        options: result of ``parse``.
        more: other arguments of ``predictor.load``.

    Raises:
        UserError: neither a config nor weights are given; see also ``predictor.load``.
    """
    from .predictor import load  # slow, and not needed to parse

    config, weights = options.config_file, options.weights
    if not (config or weights):
        raise UserError("give --weights, --config-file, or both")
    arguments = {"opts": options.opts, "allow_pickle": options.allow_pickle, **more}
    return load(config or weights, weights=weights if config else "", **arguments)


def add_dtype_argument(parser: argparse.ArgumentParser) -> None:
    """Add the option --dtype."""
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "bfloat16", "float16"),
        help="of convolutions and products in inference; results stay float32 (float16: GPU only)",
    )
