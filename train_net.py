#!/usr/bin/env python
"""Train and evaluate any Detectron2 model, with the options of Detectron2's own train_net.py."""

import argparse
import sys
from contextlib import nullcontext
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import default_setup, launch
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import setup_logger
from torch.multiprocessing import ProcessExitedException

from solo_d2.arguments import parse
from solo_d2.checkpoint import build_checkpointer
from solo_d2.config import load_config
from solo_d2.data import require_images, setup_datasets
from solo_d2.engine import Trainer, check_config, training_folder
from solo_d2.errors import UserError, is_user_error, one_line
from solo_d2.evaluation.coco import write_results
from solo_d2.model_zoo import get_config_file

EXIT_ERROR, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130


def evaluate(cfg: CfgNode, *, resume: bool) -> dict[str, Any]:
    """Evaluate MODEL.WEIGHTS, or with ``resume`` the last checkpoint in OUTPUT_DIR."""
    model = Trainer.build_model(cfg)
    build_checkpointer(cfg, model, require_complete=True).resume_or_load(
        cfg.MODEL.WEIGHTS, resume=resume
    )
    results = Trainer.test(cfg, model)
    if cfg.TEST.AUG.ENABLED:
        results |= Trainer.test_with_augmentation(cfg, model)
    if comm.is_main_process():
        write_results(results, cfg.OUTPUT_DIR)
    return results


def main(cfg: CfgNode, args: argparse.Namespace) -> None:
    """What each process does."""
    check_config(cfg, comm.get_world_size())
    setup_datasets(cfg)
    require_images(cfg)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="solo_d2")
    cfg.freeze()
    default_setup(cfg, args)
    if args.eval_only:
        evaluate(cfg, resume=args.resume)
        return
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    trainer.train()


def main_of_several(cfg: CfgNode, args: argparse.Namespace) -> None:
    """``main`` in a process whose parent sees no more of an error than the exit code."""
    try:
        main(cfg, args)
    except Exception as error:
        if not is_user_error(error):
            raise
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(EXIT_ERROR)


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        description=__doc__, usage="%(prog)s [options] [KEY VALUE ...]", allow_abbrev=False
    )
    add = result.add_argument
    add("--config-file", default="", metavar="FILE",
        help="a yaml file, or a packaged one such as SOLOv2/SOLOv2_R50_3x.yaml")  # fmt: skip
    add("--data", nargs=4, metavar=("TRAIN_JSON", "TRAIN_IMAGES", "VAL_JSON", "VAL_IMAGES"),
        help="your own data: COCO json files and image folders")  # fmt: skip
    add("--resume", action="store_true", help="continue from the last checkpoint in OUTPUT_DIR")
    add("--overwrite", action="store_true", help="replace the training that OUTPUT_DIR holds")
    add("--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS (--resume: the last one)")
    add("--num-gpus", type=int, default=1, metavar="N", help="GPUs of each machine")
    add("--num-machines", type=int, default=1, metavar="N", help="machines; start it on each")
    add("--machine-rank", type=int, default=0, metavar="I", help="number of this machine, from 0")
    add("--dist-url", default="auto", metavar="URL",
        help="where several machines meet: tcp://<address of machine 0>:<port>")  # fmt: skip
    return result


def check_machines(cfg: CfgNode, args: argparse.Namespace) -> None:
    """
    Raises:
        UserError: the processes that are asked for cannot be started.
    """
    if not 0 <= args.machine_rank < args.num_machines:
        raise UserError(f"--machine-rank must be from 0 to {args.num_machines - 1}")
    if args.num_machines > 1 and args.dist_url == "auto":
        raise UserError("--dist-url: several machines need tcp://<address of machine 0>:<port>")
    devices = torch.cuda.device_count()
    if args.num_gpus < 1 or (args.num_gpus * args.num_machines > 1 and args.num_gpus > devices):
        raise UserError(f"--num-gpus is {args.num_gpus}; {devices} CUDA devices are visible")


def run(argv: list[str] | None = None) -> int:
    args = parse(parser(), argv)
    code = EXIT_USAGE
    try:
        if args.config_file and not PathManager.isfile(args.config_file):
            args.config_file = get_config_file(args.config_file)  # Detectron2 logs its content
        cfg = load_config(args.config_file, data=args.data or (), opts=args.opts)
        check_machines(cfg, args)
        code = EXIT_ERROR
        folder: Any = nullcontext()
        if not args.eval_only and args.machine_rank == 0:
            folder = training_folder(cfg.OUTPUT_DIR, resume=args.resume, overwrite=args.overwrite)
        several = args.num_gpus * args.num_machines > 1
        with folder:
            launch(
                main_of_several if several else main,
                args.num_gpus,
                num_machines=args.num_machines,
                machine_rank=args.machine_rank,
                dist_url=args.dist_url,
                args=(cfg, args),
            )
    except ProcessExitedException as error:
        if error.exit_code < 0:  # killed; else it has said why
            print(f"error: {error}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        print("interrupted; --resume continues from the last checkpoint", file=sys.stderr)
        return EXIT_INTERRUPTED
    except Exception as error:
        if not is_user_error(error):
            raise
        print(f"error: {one_line(error)}", file=sys.stderr)
        return code
    print(f"Results are in {cfg.OUTPUT_DIR}")
    return 0


if __name__ == "__main__":
    sys.exit(run())
