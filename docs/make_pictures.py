#!/usr/bin/env python
"""Draw docs/images/masks.jpg, the picture of the README: make_pictures.py [RUN].

Above are images of $DETECTRON2_DATASETS/nuclei (CC0), below what the packaged model finds in them.
With RUN, the folder of a whole training on shapes such as output/demo, a third row shows these.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

import solo_d2
from solo_d2.data import SHAPES
from solo_d2.data.catalog import datasets_folder

NUCLEI = (
    *("10ba6cbee4873b32.jpg", "24a20f2a529cede5.jpg"),
    *("0bf4b144167694b6.jpg", "33618678c167c5e0.jpg"),
)
SHAPES_IMAGES = ("000002.jpg", "000003.jpg", "000004.jpg", "000010.jpg")
SIZE, GAP = 240, 6


def main(run: str = "") -> None:
    model = solo_d2.load("nuclei")
    results = [model.predict(datasets_folder() / "nuclei" / "val" / name) for name in NUCLEI]
    rows = [
        beside([square(result.image) for result in results]),
        beside([square(result.draw(labels=False)) for result in results]),
    ]
    if run:
        model = solo_d2.load(run)
        folder = SHAPES.ensure(count=200, size=(128, 128), seed=0, split="val") / "val"
        # enlarged first, so that labels and outlines are sharp
        images = [Image.open(folder / name).resize((SIZE, SIZE)) for name in SHAPES_IMAGES]
        rows.append(beside([result.draw() for result in model.predict(images)]))
    gap = np.full((GAP, rows[0].shape[1], 3), 255, np.uint8)
    parts = [part for row in rows for part in (row, gap)]
    target = Path(__file__).parent / "images" / "masks.jpg"
    Image.fromarray(np.concatenate(parts[:-1])).save(target, quality=88)


def square(image: np.ndarray) -> np.ndarray:
    """The middle of an image, at the size of a tile."""
    height, width = image.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    crop = Image.fromarray(image[top : top + side, left : left + side])
    return np.asarray(crop.resize((SIZE, SIZE), Image.Resampling.LANCZOS))


def beside(tiles: list[np.ndarray]) -> np.ndarray:
    gap = np.full((SIZE, GAP, 3), 255, np.uint8)
    parts = [part for tile in tiles for part in (tile, gap)]
    return np.concatenate(parts[:-1], axis=1)


if __name__ == "__main__":
    main(*sys.argv[1:])
