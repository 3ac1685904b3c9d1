"""Train and evaluate any Detectron2 model: ``solo-d2 train --help``.

The options are those of Detectron2's own train_net.py, and some more.
"""

import argparse
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import default_setup, launch
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from torch.multiprocessing import ProcessExitedException

from solo_d2.arguments import parse, print_error
from solo_d2.checkpoint import build_checkpointer
from solo_d2.config import load_config, use_available_device
from solo_d2.data import require_images, setup_datasets
from solo_d2.engine import (
    Trainer,
    check_config,
    set_epochs,
    set_up_logging,
    training_folder,
)
from solo_d2.errors import UserError
from solo_d2.evaluation.coco import results_table, write_results
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


def train_or_evaluate(cfg: CfgNode, args: argparse.Namespace) -> None:
    """The work of each process."""
    check_config(cfg, comm.get_world_size())
    set_up_logging(cfg.OUTPUT_DIR, comm.get_rank())
    setup_datasets(cfg)
    require_images(cfg)
    if args.epochs is not None:
        set_epochs(cfg, args.epochs)
    cfg.freeze()
    default_setup(cfg, args)
    if args.eval_only:
        results = evaluate(cfg, resume=args.resume)
    else:
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=args.resume)
        results = trainer.train()
    if comm.is_main_process() and results:
        print(f"\n{results_table(results)}\n")


def one_of_several(cfg: CfgNode, args: argparse.Namespace) -> None:
    """``train_or_evaluate`` in a process from which the parent gets only the exit code."""
    try:
        train_or_evaluate(cfg, args)
    except Exception as error:
        print_error(error, args)
        sys.exit(EXIT_ERROR)


def _parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="solo-d2 train",
        usage="%(prog)s --config-file FILE [options] [KEY VALUE ...]",
        description="Train and evaluate any Detectron2 model.",
        allow_abbrev=False,
    )
    add = result.add_argument
    add("--config-file", default="", metavar="FILE",
        help="a yaml file, or a packaged one such as SOLOv2/SOLOv2_R50_3x.yaml")  # fmt: skip
    add("--data", nargs=4, metavar=("TRAIN_JSON", "TRAIN_IMAGES", "VAL_JSON", "VAL_IMAGES"),
        help="your own data: COCO json files and image folders")  # fmt: skip
    add("--epochs", type=float, metavar="N",
        help="number of times each image is seen; scales the config's schedule")  # fmt: skip
    add("--resume", action="store_true", help="continue from the last checkpoint in OUTPUT_DIR")
    add("--overwrite", action="store_true", help="replace an existing training run in OUTPUT_DIR")
    add("--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS (--resume: the last one)")
    add("--num-gpus", type=int, default=1, metavar="N", help="GPUs per machine")
    add("--num-machines", type=int, default=1, metavar="N", help="machines; start this on each")
    add("--machine-rank", type=int, default=0, metavar="I", help="number of this machine, from 0")
    add("--dist-url", default="auto", metavar="URL",
        help="where several machines meet: tcp://<address of machine 0>:<port>")  # fmt: skip
    return result


def check_machines(cfg: CfgNode, args: argparse.Namespace) -> None:
    """
    Raises:
        UserError: the requested processes cannot be started.
    """
    if not 0 <= args.machine_rank < args.num_machines:
        raise UserError(f"--machine-rank must be from 0 to {args.num_machines - 1}")
    if args.num_machines > 1 and args.dist_url == "auto":
        raise UserError("--dist-url: several machines need tcp://<address of machine 0>:<port>")
    devices = torch.cuda.device_count()
    if args.num_gpus < 1 or (args.num_gpus * args.num_machines > 1 and args.num_gpus > devices):
        raise UserError(f"--num-gpus is {args.num_gpus}; {devices} CUDA devices are visible")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 0, 1 after an error, 2 for a wrong option or config."""
    args = parse(_parser(), arguments)
    code = EXIT_USAGE
    try:
        if args.config_file and not PathManager.isfile(args.config_file):
            args.config_file = get_config_file(args.config_file)  # Detectron2 logs its content
        cfg = load_config(args.config_file, data=args.data or (), opts=args.opts)
        use_available_device(cfg)
        check_machines(cfg, args)
        code = EXIT_ERROR
        folder: Any = nullcontext()
        if not args.eval_only and args.machine_rank == 0:
            folder = training_folder(cfg.OUTPUT_DIR, resume=args.resume, overwrite=args.overwrite)
        several = args.num_gpus * args.num_machines > 1
        with folder:
            launch(
                one_of_several if several else train_or_evaluate,
                args.num_gpus,
                num_machines=args.num_machines,
                machine_rank=args.machine_rank,
                dist_url=args.dist_url,
                args=(cfg, args),
            )
    except ProcessExitedException as error:
        if error.exit_code < 0:  # killed; otherwise it has printed the error
            print(f"error: {error}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        print("interrupted; --resume continues from the last checkpoint", file=sys.stderr)
        return EXIT_INTERRUPTED
    except Exception as error:
        print_error(error, args)
        return code
    print(f"Results are in {cfg.OUTPUT_DIR}")
    return 0
