"""Data sets and the mapper. Importing this package registers data sets under names still free."""

from .catalog import is_free, register_coco_json, register_named_sets
from .image_labels import ImageLabelMapper, build_mapper
from .label_maps import register_voc_label_maps
from .mapper import InstanceMapper
from .setup import require_images, setup_datasets
from .shapes import RODS, SHAPES, TUBES

__all__ = [
    "RODS",
    "SHAPES",
    "TUBES",
    "ImageLabelMapper",
    "InstanceMapper",
    "build_mapper",
    "register_coco_json",
    "require_images",
    "setup_datasets",
]

for _drawn in (SHAPES, RODS, TUBES):
    if is_free(f"{_drawn.name}_train") and is_free(f"{_drawn.name}_val"):
        _drawn.register()
register_named_sets()
register_voc_label_maps()
