#!/usr/bin/env python
"""Train and evaluate, with the options of Detectron2's own train_net.py and --data."""

import argparse
import os
import sys
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser, default_setup
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from solo_d2.config import load_config
from solo_d2.data import setup_datasets
from solo_d2.engine import (
    Trainer,
    build_checkpointer,
    launch,
    scale_learning_rate,
    write_results,
)
from solo_d2.errors import UserError, one_line

EXIT_ERROR, EXIT_USAGE = 1, 2


def evaluate(cfg: CfgNode, *, resume: bool) -> dict[str, Any]:
    """Evaluate MODEL.WEIGHTS, or with ``resume`` the last checkpoint in OUTPUT_DIR."""
    try:
        model = Trainer.build_model(cfg)
        build_checkpointer(cfg, model).resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)
    except (ValueError, KeyError, OSError) as error:
        raise UserError(one_line(error)) from error
    results = Trainer.test(cfg, model)
    if comm.is_main_process():
        write_results(results, cfg.OUTPUT_DIR)
    return results


def main(cfg: CfgNode, args: argparse.Namespace) -> None:
    """What each process does."""
    try:
        # Wrong data, a data set or model that is not registered, no such folder.
        setup_datasets(cfg)
        setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="solo_d2")
        scale_learning_rate(cfg)
        cfg.freeze()
        default_setup(cfg, args)
        if not args.eval_only:
            trainer = Trainer(cfg)
            trainer.resume_or_load(resume=args.resume)
    except (ValueError, KeyError, OSError) as error:
        raise UserError(one_line(error)) from error
    if args.eval_only:
        evaluate(cfg, resume=args.resume)
    else:
        trainer.train()


def parser() -> argparse.ArgumentParser:
    result = default_argument_parser()
    result.add_argument(
        "--data",
        nargs=4,
        metavar=("TRAIN_JSON", "TRAIN_IMAGES", "VAL_JSON", "VAL_IMAGES"),
        help="your own data: COCO json files and image folders (DATASETS.CUSTOM in the config)",
    )
    return result


def run(args: argparse.Namespace) -> int:
    try:
        cfg = load_config(args.config_file, data=args.data or (), opts=args.opts)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE
    try:
        launch(
            main,
            args.num_gpus,
            device=cfg.MODEL.DEVICE,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(cfg, args),
        )
    except UserError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return EXIT_ERROR
    print(f"Results are in {os.path.abspath(cfg.OUTPUT_DIR)}")
    return 0


if __name__ == "__main__":
    sys.exit(run(parser().parse_args()))
