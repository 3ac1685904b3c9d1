"""The command line of ``solo-d2 compare``, and what ``solo-d2 report`` shares with it."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from solo_d2.arguments import add_dtype_argument, parse, print_error
from solo_d2.engine import training_folder
from solo_d2.errors import UserError
from solo_d2.tools.train import EXIT_ERROR, EXIT_INTERRUPTED, EXIT_USAGE

from .comparison import Comparison
from .report import terminal_table
from .runs import read_models

DATA = ("TRAIN_JSON", "TRAIN_IMAGES", "VAL_JSON", "VAL_IMAGES")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code (see ``--help``)."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = parse(_parser(), words)
    return run(options, shlex.join(["solo-d2", "compare", *words]))


def run(options: argparse.Namespace, command: str) -> int:
    """Make the comparison that ``options`` ask for and print its table; returns the exit code."""
    output = Path(options.output)
    started = False
    try:
        if not options.inputs:
            raise UserError("no CONFIG: name the yaml files to compare")
        models = read_models(
            options.inputs,
            options.weights,
            data=options.data or (),
            opts=options.opts,
            iterations=options.iterations,
        )
        with training_folder(str(output), resume=True, overwrite=False):
            comparison = Comparison(models, options, command)
            started = True
            all_done = comparison.execute()
    except KeyboardInterrupt:
        print(f"\ninterrupted; the same command goes on from {output}", file=sys.stderr)
        return EXIT_INTERRUPTED
    except Exception as error:
        print_error(error, options)
        return EXIT_ERROR if started else EXIT_USAGE
    page = (output / "report.html").absolute()
    print(f"\n{terminal_table(comparison.report)}\n\nThe report is {page}")
    return 0 if all_done else EXIT_ERROR


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="solo-d2 compare",
        description="Train, evaluate and measure several models on the same data, and write "
        "report.html, report.md and report.json. If it is killed, run the same command again.",
        usage="%(prog)s CONFIG ... --output DIR [options] [KEY VALUE ...]",
        epilog="KEY VALUE pairs override all configs. Exit code: 0 all done, 1 a model failed, 2 "
        "nothing could be started.",
    )
    add = parser.add_argument
    files = "yaml files, each alone or as NAME=FILE; FILE+FILE is one training in stages"
    add("inputs", nargs="*", metavar="CONFIG", help=files)
    add("--output", required=True, metavar="DIR", help="also what is resumed")
    weights = "to evaluate, one for each CONFIG; '-' for one that is to be trained"
    add("--weights", nargs="+", default=[], metavar="PTH", help=weights)
    add("--train", action="store_true", help="train what has no weights")
    seeds = "train with K seeds, from SEED up"
    add("--seeds", type=_positive, default=1, metavar="K", help=seeds)
    rates = "train each model with each of these SOLVER.BASE_LR; the best by mask AP counts"
    add("--lrs", type=_rates, default=(), metavar="A,B,C", help=rates)
    iterations = (
        "train each model for N iterations, all stages together, with the steps of the learning "
        "rate in proportion (default: SOLVER.MAX_ITER)"
    )
    add("--iterations", type=_positive, metavar="N", help=iterations)
    add("--data", nargs=4, metavar=DATA, help="your own data, as in solo-d2 train")
    allow = "compare configs that differ in data, schedule or evaluation; the report shows them"
    add("--allow-differences", action="store_true", help=allow)
    jobs = "trainings at a time, all on the same device (default 1)"
    add("--jobs", type=_positive, default=1, metavar="N", help=jobs)
    add("--num-gpus", type=_positive, default=1, help="for training")
    add_measuring_options(parser)
    return parser


def add_measuring_options(parser: argparse.ArgumentParser) -> None:
    """What ``solo-d2 report`` has too."""
    for name, default, what in (
        ("batch", 8, "time inference on batches of 1 and of N images"),
        ("images-for-timing", 30, "images of the test set for timing, spread evenly over it"),
        ("steps-for-timing", 10, "training steps of each model that are timed in turn"),
        ("gallery", 12, "images in the report"),
    ):
        help_text = f"{what} (default {default})"
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=help_text)
    add_dtype_argument(parser)  # of --weights and of what is timed; training evaluates in float32


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


def _rates(text: str) -> tuple[float, ...]:
    rates = tuple(float(x) for x in text.split(","))
    if min(rates) <= 0:
        raise argparse.ArgumentTypeError(f"{text}: learning rates must be above 0")
    return tuple(dict.fromkeys(rates))
