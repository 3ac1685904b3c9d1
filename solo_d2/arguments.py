"""The command line of every tool: options anywhere among the KEY VALUE pairs."""

import argparse
from collections.abc import Sequence


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse options, which may stand before, between and after KEY VALUE pairs of the config.

    Args:
        parser: without positional arguments.
        argv: words; by default the command line's.

    Returns:
        The parser's namespace with ``opts``, the keys and values in turn. What is wrong ends the
        program with a message and exit code 2, as usual.
    """
    args, opts = parser.parse_known_args(argv)
    for key in opts[::2]:
        if key.startswith("-"):
            parser.error(f"there is no option {key}")
    if len(opts) % 2:
        parser.error(f"KEY VALUE pairs: {opts[-1]!r} has no value ({len(opts)} words in all)")
    args.opts = opts
    return args
