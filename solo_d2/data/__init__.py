"""Data sets. Importing this package registers "shapes_*" and "coco_mini_*"."""

from .coco_json import register_coco_json, register_coco_mini
from .setup import num_classes, setup_datasets
from .shapes import ensure_shapes, generate_shapes, register_shapes

__all__ = [
    "ensure_shapes",
    "generate_shapes",
    "num_classes",
    "register_coco_json",
    "register_coco_mini",
    "register_shapes",
    "setup_datasets",
]

register_shapes()
register_coco_mini()
