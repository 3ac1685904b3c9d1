"""Run by test_distributed.py: what two gloo processes compute, written to a folder.

As a script, because each process imports it anew.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.utils import comm
from torch.nn.parallel import DistributedDataParallel

from solo_d2 import add_solo_d2_config
from solo_d2.data import setup_datasets
from solo_d2.engine import Trainer, launch
from solo_d2.engine.loader import build_train_loader
from solo_d2.errors import UserError


def tiny_solov2(config_file: str):
    cfg = get_cfg()
    add_solo_d2_config(cfg)
    cfg.merge_from_file(config_file)
    # Group norm over a single cell, as on the coarsest level of smaller images, amplifies rounding.
    cfg.INPUT.MIN_SIZE_TRAIN = (64,)
    setup_datasets(cfg)
    return cfg


def gradients(cfg) -> dict[str, torch.Tensor]:
    """Of the first batch, or of this process' part of it averaged over the processes."""
    torch.manual_seed(0)
    model = build_model(cfg).train()
    batch = next(iter(build_train_loader(cfg)))
    wrapped = model
    if comm.get_world_size() > 1:
        wrapped = DistributedDataParallel(model, broadcast_buffers=False)
    sum(wrapped(batch).values()).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


class Poisoned(Trainer):
    """The second process gets a NaN in iteration 1."""

    def run_step(self):
        if self.iter == 1 and comm.get_rank() == 1:
            batch = next(self._trainer._data_loader_iter)
            batch[0]["image"] = torch.full_like(batch[0]["image"].float(), float("nan"))
            self._trainer._data_loader_iter_obj = iter([batch])
        super().run_step()


def work(args: argparse.Namespace) -> None:
    cfg = tiny_solov2(args.config)
    found = gradients(cfg)
    if comm.is_main_process():
        torch.save(found, args.folder / "gradients.pth")
    cfg.OUTPUT_DIR = str(args.folder)
    Poisoned(cfg).train()


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("config")
    arguments.add_argument("folder", type=Path)
    args = arguments.parse_args()
    try:
        launch(work, 2, device="cpu", args=(args,))
    except UserError as error:
        (args.folder / "error.json").write_text(json.dumps(str(error)))
        sys.exit(1)


if __name__ == "__main__":
    main()
