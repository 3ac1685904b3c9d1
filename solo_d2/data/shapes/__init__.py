"""The embedded data set that the small models are trained on: flat shapes of five classes."""

from ..drawn import DrawnSet
from .drawing import CLASSES, draw_scene

SHAPES = DrawnSet(
    name="shapes",
    version=2,
    # Not contiguous, as COCO's are not.
    category_ids=dict(zip(CLASSES, (1, 2, 3, 5, 8))),
    draw_scene=draw_scene,
    train_images=2000,
    val_images=200,
    image_size=(128, 128),
    suffix=".jpg",
    # COCO has polygons and both kinds of RLE; so does this.
    polygons=0.8,
)

__all__ = ["SHAPES"]
