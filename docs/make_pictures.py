#!/usr/bin/env python
"""Draw docs/images/masks.jpg, the picture of the README: make_pictures.py RUN.

RUN is the folder of a training on shapes, such as output/demo. The nuclei are found by the packaged
model, in images of $DETECTRON2_DATASETS/nuclei (CC0).
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

import solo_d2
from solo_d2.data import SHAPES
from solo_d2.data.catalog import datasets_folder

NUCLEI = ("10ba6cbee4873b32.jpg", "24a20f2a529cede5.jpg", "0bf4b144167694b6.jpg")
SHAPES_IMAGES = ("000005.jpg", "000007.jpg", "000013.jpg")
SIZE, GAP = 320, 8


def main(run: str) -> None:
    model = solo_d2.load("nuclei")
    folder = datasets_folder() / "nuclei" / "val"
    top = [square(model.predict(folder / name).draw(labels=False)) for name in NUCLEI]
    model = solo_d2.load(run)
    folder = SHAPES.ensure(count=20, size=(128, 128), seed=0, split="val") / "val"
    bottom = []
    for name in SHAPES_IMAGES:
        # enlarged first, so that labels and outlines are sharp
        image = Image.open(folder / name).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        bottom.append(np.asarray(square(model.predict(image).draw(score_threshold=0.35))))
    rows = [beside(row) for row in (top, bottom)]
    gap = np.full((GAP, rows[0].shape[1], 3), 255, np.uint8)
    target = Path(__file__).parent / "images" / "masks.jpg"
    Image.fromarray(np.concatenate([rows[0], gap, rows[1]])).save(target, quality=88)


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
    main(sys.argv[1])
