"""Data sets. Importing this package registers the embedded ones and "coco_mini_*"."""

from .coco_json import register_coco_json, register_coco_mini
from .setup import EMBEDDED, setup_datasets
from .shapes import SHAPES
from .toys import RODS, TUBES

__all__ = [
    "EMBEDDED",
    "RODS",
    "SHAPES",
    "TUBES",
    "register_coco_json",
    "register_coco_mini",
    "setup_datasets",
]

for _drawn in EMBEDDED.values():
    _drawn.register()
register_coco_mini()
