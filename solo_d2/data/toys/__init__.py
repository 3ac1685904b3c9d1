"""The toy data sets of the AdaptIS paper, drawn anew after the recipe of their description."""

from ..drawn import DrawnSet
from .drawing import draw_rods, draw_tubes

# Number of images and their size as published.
RODS = DrawnSet(
    name="rods",
    version=1,
    category_ids={"rod": 1},
    draw_scene=draw_rods,
    train_images=10000,
    val_images=2000,
    image_size=(96, 96),
)
TUBES = DrawnSet(
    name="tubes",
    version=1,
    category_ids={"tube": 1},
    draw_scene=draw_tubes,
    train_images=25000,
    val_images=1000,
    image_size=(128, 128),
)

__all__ = ["RODS", "TUBES"]
