"""Error analysis of a results file: ``solo-d2 errors --help``."""

import argparse
import contextlib
import io
import json
from collections.abc import Sequence
from pathlib import Path

from pycocotools.coco import COCO
from tabulate import tabulate

from solo_d2.arguments import parse, print_error
from solo_d2.config import load_config
from solo_d2.data import setup_datasets
from solo_d2.errors import UserError
from solo_d2.evaluation.oracle import KINDS, METRICS, error_costs
from solo_d2.files import atomic_write
from solo_d2.tools.compare.accuracy import TestSet


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code: 0, or 2 after an error of one line."""
    options = parse(_parser(), arguments)
    try:
        ground_truth = _load_data(options.data, options.opts)
        costs = error_costs(ground_truth, _load_results(options.results, ground_truth))
        if options.output:
            with atomic_write(options.output) as file:
                file.write(json.dumps(costs, indent=1).encode())
    except Exception as error:
        print_error(error, options)
        return 2
    rows = [
        [
            kind,
            *("-" if cost[k] is None else f"{cost[k]:.1f}" for k in METRICS),
            KINDS.get(kind, ""),
        ]
        for kind, cost in costs.items()
    ]
    widths = [None] * (1 + len(METRICS)) + [50]
    heads = ["", *METRICS, "what is corrected"]
    print(tabulate(rows, heads, disable_numparse=True, maxcolwidths=widths))
    print("\nPoints of mask AP that each kind of error costs. They do not add up.")
    return 0


def _load_data(name: str, opts: Sequence[str]) -> COCO:
    if not Path(name).is_file():
        setup_datasets(load_config(opts=opts))
        return TestSet(name).coco
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(name)
        for number, x in enumerate(coco.dataset.get("annotations", ()), start=1):
            x["id"] = number  # to pycocotools, a match with an object of id 0 is none
        coco.createIndex()
    return coco


def _load_results(path: str, ground_truth: COCO) -> list[dict]:
    """
    Raises:
        UserError: it is no file of COCO results with masks, or is of another data set.
    """
    keys = {"image_id", "category_id", "score", "segmentation"}
    try:
        results = json.loads(Path(path).read_bytes())
        complete = all(keys <= x.keys() for x in results)
    except (ValueError, TypeError, AttributeError):
        complete = False
    if not complete:
        raise UserError(f"{path} is not a list of COCO results with {', '.join(sorted(keys))}")
    if unknown := {x["image_id"] for x in results} - ground_truth.imgs.keys():
        raise UserError(f"{path} has detections on image {min(unknown)}, which the data set lacks")
    return results


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="solo-d2 errors",
        usage="%(prog)s RESULTS.json --data NAME_OR_JSON [--output FILE] [KEY VALUE ...]",
        description="Say how many points of mask AP each kind of error costs: masks, classes, "
        "duplicates, background, missed objects.",
    )
    parser.add_argument(
        "results", metavar="RESULTS.json", help="coco_instances_results.json of a run"
    )
    parser.add_argument("--data", required=True, help="a registered data set, or a COCO json file")
    parser.add_argument("--output", metavar="FILE", help="also write the numbers as JSON")
    return parser
