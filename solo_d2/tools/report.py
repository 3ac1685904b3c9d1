"""Report on one trained model: ``solo-d2 report RUN``."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from solo_d2.arguments import parse

from .compare import cli


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 0, 1 after a failure, 2 if nothing could be started."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(
        prog="solo-d2 report",
        usage="%(prog)s RUN [options] [KEY VALUE ...]",
        description="Evaluate and measure the model of a run folder; write RUN/report/report.html, "
        "report.md, report.json and per_class.csv.",
    )
    parser.add_argument("run", help="output folder of a training run: config.yaml, model_final.pth")
    parser.add_argument("--weights", help="a checkpoint other than RUN/model_final.pth")
    parser.add_argument("--data", nargs=4, metavar=cli.DATA, help="other data, as in solo-d2 train")
    cli.add_measuring_options(parser)
    parser.set_defaults(train=False, seeds=1, lrs=(), iterations=None, allow_differences=False)
    parser.set_defaults(num_gpus=1, jobs=1)
    options = parse(parser, words)
    folder = Path(options.run)
    if not (folder / "config.yaml").is_file():
        print(f"error: {folder} is not a run folder: it has no config.yaml", file=sys.stderr)
        return cli.EXIT_USAGE
    options.inputs = [f"{folder.resolve().name}={folder / 'config.yaml'}"]
    options.weights = [options.weights or str(folder / "model_final.pth")]
    options.output = str(folder / "report")
    return cli.run(options, shlex.join(["solo-d2", "report", *words]))
