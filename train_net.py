#!/usr/bin/env python
"""Train and evaluate, with the options of Detectron2's own train_net.py, --data and --then."""

import argparse
import os
import sys
from pathlib import Path
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
    chain_stages,
    is_finished,
    launch,
    leave_log_files,
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
    result.add_argument(
        "--then",
        action="append",
        default=[],
        metavar="FILE",
        help="config of a next training, which starts from the final model of the one before; "
        "KEY VALUE pairs are for all, an OUTPUT_DIR among them gets a folder for each; with "
        "--resume, those that are finished are not repeated",
    )
    return result


def run(args: argparse.Namespace) -> int:
    files = [args.config_file, *args.then]
    try:
        if args.then and args.eval_only:
            raise UserError("--eval-only evaluates one config, without --then")
        cfgs = [load_config(file, data=args.data or (), opts=args.opts) for file in files]
        chain_stages(cfgs, [Path(file).stem for file in files])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE
    try:
        for cfg in cfgs:
            if args.then and args.resume and is_finished(cfg):
                print(f"{cfg.OUTPUT_DIR} is finished")
                continue
            launch(
                main,
                args.num_gpus,
                device=cfg.MODEL.DEVICE,
                num_machines=args.num_machines,
                machine_rank=args.machine_rank,
                dist_url=args.dist_url,
                args=(cfg, args),
            )
            leave_log_files()
    except UserError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return EXIT_ERROR
    print(f"Results are in {os.path.abspath(cfgs[-1].OUTPUT_DIR)}")
    return 0


if __name__ == "__main__":
    sys.exit(run(parser().parse_args()))
