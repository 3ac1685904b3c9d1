"""The embedded data sets "shapes", "rods" and "tubes", drawn on first use, in COCO's format."""

import json
import logging
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pycocotools.mask as mask_util
from numpy.random import Generator
from numpy.typing import NDArray
from tqdm import trange

from .annotations import decompress
from .cache import ensure_folder
from .catalog import CocoLoader, enter, folder_files
from .scenes import CLASSES, DrawnObject, Scene, draw_scene
from .toys import draw_rods, draw_tubes

# A polygon replaces a mask only if pycocotools rasterizes it with at least this IoU.
_POLYGON_IOU = 0.95
_JPEG_QUALITY = 95


@dataclass(frozen=True)
class DrawnSet:
    """A data set "<name>_train" and "<name>_val" of random scenes."""

    name: str
    # Part of the cache folder's name: increase it when the same parameters give other files.
    version: int
    category_ids: Mapping[str, int]  # class name -> category id, in class order
    draw_scene: Callable[[Generator, int, int], Scene]  # (random numbers, height, width)
    # Defaults of ``register``: images per split; height and width in pixels.
    train_images: int
    val_images: int
    image_size: tuple[int, int]
    suffix: str = ".png"
    # Share of the objects whose mask is written as a polygon, if one polygon can represent it.
    polygons: float = 0.0

    @property
    def classes(self) -> list[str]:
        return list(self.category_ids)

    def generate(
        self, root: str | Path, *, count: int, size: tuple[int, int], seed: int, split: str
    ) -> None:
        """Write ``root/annotations/instances_<split>.json`` and the images in ``root/<split>/``.

        An image and its masks depend only on the seed, the split, the index and the size.

        Args:
            root: created if needed.
            count: number of images.
            size: height and width in pixels, at least 32.
            seed: not negative.
            split: any name; "train" and "val" are disjoint draws.

        Raises:
            ValueError: a parameter is out of range.
        """
        if count < 1 or min(size) < 32 or seed < 0:
            raise ValueError(
                f"{self.name} need at least 1 image, sides of 32 pixels and a seed >= 0; "
                f"got count {count}, size {tuple(size)}, seed {seed}"
            )
        root = Path(root)
        (root / "annotations").mkdir(parents=True, exist_ok=True)
        (root / split).mkdir(exist_ok=True)
        logging.getLogger(__name__).info(f"Drawing {count} images of {self.name}_{split}")
        images: list[dict] = []
        annotations: list[dict] = []
        # on terminals only
        for index in trange(count, desc=f"Drawing {self.name}_{split}", leave=False, disable=None):
            rng = np.random.default_rng([seed, zlib.crc32(split.encode()), index])
            image, objects = self.draw_scene(rng, *size)
            file_name = f"{index + 1:06d}{self.suffix}"
            options = [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY] if self.suffix == ".jpg" else []
            if not cv2.imwrite(str(root / split / file_name), image[..., ::-1], options):
                raise OSError(f"cannot write {root / split / file_name}")
            images.append(
                {"id": index + 1, "file_name": file_name, "height": size[0], "width": size[1]}
            )
            for thing in objects:
                ids = {"id": len(annotations) + 1, "image_id": index + 1}
                category = {"category_id": self.category_ids[self.classes[thing.category]]}
                annotations.append(ids | category | mask_annotation(rng, thing, self.polygons))
        document = {
            "info": {"description": f"solo_d2 {self.name}, {split}", "version": str(self.version)},
            "licenses": [],
            "images": images,
            "annotations": annotations,
            "categories": [{"id": i, "name": name} for name, i in self.category_ids.items()],
        }
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(document))

    def ensure(self, *, count: int, size: tuple[int, int], seed: int, split: str) -> Path:
        """The folder of a split in the cache, drawn if it does not exist yet.

        The folder is never incomplete, even if several processes need it at once or one is killed
        half-way. Arguments and errors are those of ``generate``.
        """
        name = f"{self.name}-v{self.version}-{split}-{count}x{size[0]}x{size[1]}-seed{seed}"
        draw = partial(self.generate, count=count, size=size, seed=seed, split=split)
        return ensure_folder(name, draw)

    def register(
        self,
        *,
        train_images: int | None = None,
        val_images: int | None = None,
        image_size: tuple[int, int] | None = None,
        seed: int = 0,
    ) -> None:
        """Register "<name>_train" and "<name>_val"; they are drawn when they are loaded.

        Registering again replaces them.

        Args:
            train_images, val_images: images per split.
            image_size: height and width in pixels.
            seed: seed of the random numbers.
        """
        height, width = image_size or self.image_size
        counts = {
            "train": train_images or self.train_images,
            "val": val_images or self.val_images,
        }
        for split, count in counts.items():
            ensure = partial(
                self.ensure, count=count, size=(int(height), int(width)), seed=seed, split=split
            )
            loader = CocoLoader(f"{self.name}_{split}", partial(folder_files, ensure, split))
            enter(loader, thing_classes=self.classes)


def mask_annotation(rng: Generator, thing: DrawnObject, polygons: float) -> dict[str, Any]:
    """An object in COCO's format; area and box are those of the segmentation as written."""
    rle = mask_util.encode(np.asfortranarray(thing.mask, np.uint8))
    segmentation: Any = {"size": list(thing.mask.shape), "counts": rle["counts"].decode()}
    if thing.is_crowd:  # COCO stores crowds uncompressed
        segmentation["counts"] = decompress(segmentation["counts"])
    elif rng.uniform() < polygons:
        polygon = _polygon(thing.mask)
        if polygon is not None:
            segmentation = [polygon]
            rle = mask_util.frPyObjects(segmentation, *thing.mask.shape)[0]
    return {
        "iscrowd": int(thing.is_crowd),
        "area": int(mask_util.area(rle)),
        "bbox": mask_util.toBbox(rle).tolist(),
        "segmentation": segmentation,
    }


def _polygon(mask: NDArray[np.bool_]) -> list[float] | None:
    """x, y, x, y, ... around a mask; None if one polygon cannot represent it."""
    doubled = mask.astype(np.uint8).repeat(2, axis=0).repeat(2, axis=1)
    contours, _ = cv2.findContours(doubled, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    if len(contours) != 1:  # several parts, or a hole
        return None
    # from the centers of boundary pixels, in doubled coordinates, to the nearest pixel corners
    corners = np.round((contours[0] + 0.5) / 2).astype(np.float32)
    outline = cv2.approxPolyDP(corners, 0.6, closed=True).reshape(-1, 2)
    if len(outline) < 3:
        return None
    polygon = outline.ravel().tolist()
    drawn = mask_util.frPyObjects([polygon], *mask.shape)
    rle = mask_util.encode(np.asfortranarray(mask, np.uint8))
    return polygon if mask_util.iou(drawn, [rle], [0])[0, 0] >= _POLYGON_IOU else None


# The set that the small models are trained on: flat shapes of five classes.
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
    # COCO has polygons and both kinds of RLE, and so does this set.
    polygons=0.8,
)
# The toy sets of the AdaptIS paper, drawn according to their published description, with the
# published numbers and sizes.
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
