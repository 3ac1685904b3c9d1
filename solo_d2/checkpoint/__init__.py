"""Saving and loading weights."""

from typing import Any

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from torch import nn

from .checkpointer import Checkpointer

__all__ = ["Checkpointer", "build_checkpointer"]


def build_checkpointer(cfg: CfgNode, model: nn.Module, **options: Any) -> Checkpointer:
    """A checkpointer in OUTPUT_DIR that knows the classes of the config's data."""
    thing_classes = None
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        thing_classes = thing_classes or MetadataCatalog.get(name).get("thing_classes")
    return Checkpointer(model, cfg.OUTPUT_DIR, thing_classes=thing_classes, **options)
