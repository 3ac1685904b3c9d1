"""Sets of drawn shapes in COCO's format, made on first use."""

import json
import zlib
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pycocotools.mask as mask_util
from numpy.random import Generator
from numpy.typing import NDArray

from ..cache import cache_folder, ensure_folder
from ..coco_json import load_records, register
from .drawing import CLASSES, Shape, draw_scene

# Part of the cache folder's name: raise it whenever the same parameters give other files.
FORMAT_VERSION = 2
# Not contiguous, as COCO's are not.
CATEGORY_IDS = dict(zip(CLASSES, (1, 2, 3, 5, 8)))
# A polygon stands for a mask only if pycocotools draws it back with at least this IoU.
_POLYGON_IOU = 0.95
_JPEG_QUALITY = 95


def generate_shapes(
    root: str | Path, *, count: int, size: tuple[int, int], seed: int, split: str
) -> None:
    """Write ``root/annotations/instances_<split>.json`` and the images in ``root/<split>/``.

    An image and its masks depend on the seed, the split, the index and the size alone.

    Args:
        root: made if needed.
        count: number of images.
        size: height and width in pixels, at least 32.
        seed: not negative.
        split: any name; "train" and "val" are disjoint draws.

    Raises:
        ValueError: a parameter is out of range.
    """
    if count < 1 or min(size) < 32 or seed < 0:
        raise ValueError(
            "shapes need at least 1 image, sides of 32 pixels and a seed >= 0; "
            f"got count {count}, size {tuple(size)}, seed {seed}"
        )
    root = Path(root)
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    (root / split).mkdir(exist_ok=True)
    images: list[dict] = []
    annotations: list[dict] = []
    for index in range(count):
        rng = np.random.default_rng([seed, zlib.crc32(split.encode()), index])
        image, shapes = draw_scene(rng, *size)
        file_name = f"{index + 1:06d}.jpg"
        quality = [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY]
        if not cv2.imwrite(str(root / split / file_name), image[..., ::-1], quality):
            raise OSError(f"cannot write {root / split / file_name}")
        images.append(
            {"id": index + 1, "file_name": file_name, "height": size[0], "width": size[1]}
        )
        for shape in shapes:
            annotation = {"id": len(annotations) + 1, "image_id": index + 1}
            annotations.append(annotation | _annotation(rng, shape))
    document = {
        "info": {"description": f"solo_d2 shapes, {split}", "version": str(FORMAT_VERSION)},
        "licenses": [],
        "images": images,
        "annotations": annotations,
        "categories": [{"id": i, "name": name} for name, i in CATEGORY_IDS.items()],
    }
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(document))


def _annotation(rng: Generator, shape: Shape) -> dict[str, Any]:
    """A shape as COCO has it; area and box are those of the segmentation as written."""
    rle = mask_util.encode(np.asfortranarray(shape.mask, np.uint8))
    segmentation: Any = {"size": list(shape.mask.shape), "counts": rle["counts"].decode()}
    if shape.is_crowd:  # COCO's crowds are uncompressed
        segmentation["counts"] = _uncompressed_counts(shape.mask)
    elif rng.uniform() < 0.8:
        polygon = _polygon(shape.mask)
        if polygon is not None:
            segmentation = [polygon]
            rle = mask_util.frPyObjects(segmentation, *shape.mask.shape)[0]
    return {
        "category_id": CATEGORY_IDS[CLASSES[shape.category]],
        "iscrowd": int(shape.is_crowd),
        "area": int(mask_util.area(rle)),
        "bbox": mask_util.toBbox(rle).tolist(),
        "segmentation": segmentation,
    }


def _uncompressed_counts(mask: NDArray[np.bool_]) -> list[int]:
    """Lengths of the runs of 0, 1, 0, ... down the columns."""
    flat = np.concatenate([[False], mask.ravel(order="F")])
    changes = np.flatnonzero(flat[1:] != flat[:-1])
    return np.diff(np.concatenate([[0], changes, [mask.size]])).tolist()


def _polygon(mask: NDArray[np.bool_]) -> list[float] | None:
    """x, y, x, y, ... around a mask; None where one polygon cannot stand for it."""
    doubled = mask.astype(np.uint8).repeat(2, axis=0).repeat(2, axis=1)
    contours, _ = cv2.findContours(doubled, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    if len(contours) != 1:  # several parts, or a hole
        return None
    # From the centres of boundary pixels, doubled, to the nearest corners of pixels.
    corners = np.round((contours[0] + 0.5) / 2).astype(np.float32)
    outline = cv2.approxPolyDP(corners, 0.6, closed=True).reshape(-1, 2)
    if len(outline) < 3:
        return None
    polygon = outline.ravel().tolist()
    drawn = mask_util.frPyObjects([polygon], *mask.shape)
    rle = mask_util.encode(np.asfortranarray(mask, np.uint8))
    return polygon if mask_util.iou(drawn, [rle], [0])[0, 0] >= _POLYGON_IOU else None


def _folder_name(count: int, size: tuple[int, int], seed: int, split: str) -> str:
    return f"shapes-v{FORMAT_VERSION}-{split}-{count}x{size[0]}x{size[1]}-seed{seed}"


def ensure_shapes(*, count: int, size: tuple[int, int], seed: int, split: str) -> Path:
    """The folder of a set in the cache, drawn if it is not there yet.

    The cache is $SOLO_D2_CACHE, or ~/.cache/solo_d2. The folder is complete whenever it is there,
    also when several processes ask for it at once or one is killed half-way.
    Arguments and errors are those of ``generate_shapes``.
    """
    return ensure_folder(
        _folder_name(count, size, seed, split),
        lambda folder: generate_shapes(folder, count=count, size=size, seed=seed, split=split),
    )


def register_shapes(
    *,
    train_images: int = 2000,
    val_images: int = 200,
    image_size: tuple[int, int] = (128, 128),
    seed: int = 0,
) -> None:
    """Register "shapes_train" and "shapes_val"; nothing is drawn before they are loaded.

    Registering again replaces them.

    Args:
        train_images, val_images: images per split.
        image_size: height and width in pixels.
        seed: of the drawing.
    """
    size = (int(image_size[0]), int(image_size[1]))
    ids = {category_id: i for i, category_id in enumerate(CATEGORY_IDS.values())}
    for split, count in (("train", train_images), ("val", val_images)):
        name = f"shapes_{split}"
        root = cache_folder() / _folder_name(count, size, seed, split)
        json_file = str(root / "annotations" / f"instances_{split}.json")
        image_root = str(root / split)

        def load(
            name: str = name,
            json_file: str = json_file,
            image_root: str = image_root,
            split: str = split,
            count: int = count,
        ) -> list[dict]:
            ensure_shapes(count=count, size=size, seed=seed, split=split)
            return load_records(json_file, image_root, ids, name)

        register(
            name,
            load,
            json_file=json_file,
            image_root=image_root,
            thing_classes=list(CLASSES),
            thing_dataset_id_to_contiguous_id=ids,
        )
