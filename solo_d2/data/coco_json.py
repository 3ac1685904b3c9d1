"""Data sets from COCO json files, with one clear line for whatever is wrong with them.

Detectron2's own ``load_coco_json`` drops some annotations without a word and answers others with
an assertion, and its evaluator reads the file once more by itself. Here a file is checked first;
where an annotation must be skipped or completed, a tidied copy takes the place of the file, so
that training and evaluation see the same objects.
"""

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from functools import partial
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

from .cache import cache_folder

logger = logging.getLogger(__name__)

# Part of a tidied copy's name: raise it whenever the same file is tidied differently.
_TIDY_VERSION = 1
# Polygons are drawn in time and memory that grow with their circumference, in or out of the image.
_LARGEST_COORDINATE = 1e6


class DataError(ValueError):
    """Something in a json that no training can use."""

    def __init__(self, kind: str, message: str):
        """
        Args:
            kind: what such errors have in common, for counting them.
            message: one line that names the offender.
        """
        super().__init__(message)
        self.kind = kind


def register(
    name: str, load: Callable[[], list[dict]], *, json_file: str, image_root: str, **metadata: Any
) -> None:
    """Enter a data set into Detectron2's catalogs in place of whatever had its name."""
    DatasetCatalog.pop(name, None)
    MetadataCatalog.pop(name, None)
    DatasetCatalog.register(name, load)
    MetadataCatalog.get(name).set(
        json_file=json_file, image_root=image_root, evaluator_type="coco", **metadata
    )


def register_coco_json(name: str, json_file: str | Path, image_root: str | Path) -> None:
    """Register a COCO json; its categories, in the order of their ids, are the classes.

    The file is read and checked now, its images are looked for when the set is loaded. Annotations
    that no mask model can learn from or be measured on are skipped, with one warning: boxes
    without area or outside of the image, polygons of fewer than three points, empty or missing
    masks. A missing "iscrowd" is 0; a missing "area" or "bbox" is computed from the mask; ids that
    pycocotools miscounts (it takes 0 for "no match") are numbered anew. After any of this the
    metadata's ``json_file``, which the evaluator reads, is a tidied copy in the cache folder.

    Registering a name again replaces it.

    Args:
        name: of the data set.
        json_file: in the format of COCO's instances_*.json.
        image_root: the folder that the json's file names are relative to.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: the file's content is wrong; the message names the file and the offender.
    """
    json_file, image_root = str(json_file), str(image_root)
    if not os.path.isdir(image_root):
        raise FileNotFoundError(f"no image folder {image_root} (for data set {name!r})")
    document = _read(json_file)
    categories = sorted(document["categories"], key=lambda category: category["id"])
    tidied, remarks = _tidy(document, json_file, {c["id"] for c in categories})
    source = json_file
    if remarks:
        json_file = _write_copy(json_file, tidied, f"v{_TIDY_VERSION}")
        logger.warning(f"{source}: {remarks}; training and evaluation read {json_file}")
    ids = {category["id"]: i for i, category in enumerate(categories)}
    register(
        name,
        partial(load_records, json_file, image_root, ids, name),
        json_file=json_file,
        image_root=image_root,
        thing_classes=[category["name"] for category in categories],
        thing_dataset_id_to_contiguous_id=ids,
    )


def register_coco_mini(root: str | Path | None = None) -> None:
    """Register "coco_mini_train" and "coco_mini_val": a folder with COCO's own names and classes.

    Nothing is read before they are loaded, and evaluation reads the original files.

    Args:
        root: the folder; ``coco_mini`` under $DETECTRON2_DATASETS (default "datasets") if None.
    """
    if root is None:
        root = Path(os.environ.get("DETECTRON2_DATASETS", "datasets")).expanduser() / "coco_mini"
    coco = MetadataCatalog.get("coco_2017_val")
    ids = coco.thing_dataset_id_to_contiguous_id
    for split in ("train", "val"):
        name = f"coco_mini_{split}"
        json_file = str(Path(root) / "annotations" / f"instances_{split}2017.json")
        image_root = str(Path(root) / f"{split}2017")
        register(
            name,
            partial(load_records, json_file, image_root, ids, name),
            json_file=json_file,
            image_root=image_root,
            thing_classes=coco.thing_classes,
            thing_colors=coco.thing_colors,
            thing_dataset_id_to_contiguous_id=ids,
        )


def register_subset(name: str, which: int | Sequence[int]) -> str:
    """Register a few images of a registered data set as another one.

    Args:
        name: of the whole set.
        which: how many of the first images with objects, or the ids of images.

    Returns:
        The name of the new set.

    Raises:
        ValueError: the set has fewer such images, or none of an id.
    """
    records = DatasetCatalog.get(name)
    if isinstance(which, int):
        label = f"first{which}"
        records = [
            record
            for record in records
            if any(not annotation.get("iscrowd", 0) for annotation in record["annotations"])
        ]
        if len(records) < which:
            raise ValueError(
                f"data set {name!r} has {len(records)} images with objects, not {which}"
            )
        records = records[:which]
    else:
        digest = hashlib.sha256(repr(sorted(which)).encode()).hexdigest()[:8]
        label = f"chosen{len({*which})}_{digest}"
        missing = sorted({*which} - {record["image_id"] for record in records})
        if missing:
            raise ValueError(f"data set {name!r} has no image with id {missing[0]}")
        records = [record for record in records if record["image_id"] in which]
    metadata = MetadataCatalog.get(name).as_dict()
    chosen = {record["image_id"] for record in records}
    document = _read(metadata["json_file"])
    document["images"] = [x for x in document["images"] if x["id"] in chosen]
    document["annotations"] = [x for x in document["annotations"] if x["image_id"] in chosen]
    copy = _write_copy(metadata["json_file"], document, label)
    subset = f"{name}_{label}"
    register(
        subset,
        lambda: records,
        **{k: v for k, v in metadata.items() if k not in ("name", "json_file", "evaluator_type")},
        json_file=copy,
    )
    return subset


def load_records(
    json_file: str, image_root: str, ids: dict[int, int], name: str
) -> list[dict[str, Any]]:
    """Read a COCO json into Detectron2's data set format.

    Args:
        json_file, image_root: see ``register_coco_json``.
        ids: category id to contiguous id.
        name: the data set's, for messages.

    Raises:
        FileNotFoundError: the json or an image is missing.
        ValueError: see ``register_coco_json``.
    """
    document, remarks = _tidy(_read(json_file), json_file, set(ids))
    if remarks:
        logger.warning(f"{json_file}: {remarks}")
    records = {
        image["id"]: {
            "file_name": os.path.join(image_root, image["file_name"]),
            "height": image["height"],
            "width": image["width"],
            "image_id": image["id"],
            "annotations": [],
        }
        for image in document["images"]
    }
    missing = [r["file_name"] for r in records.values() if not os.path.exists(r["file_name"])]
    if missing:
        raise FileNotFoundError(
            f"{json_file}: {len(missing)} of {len(records)} images are missing: "
            + ", ".join(missing[:3])
            + (", ..." if len(missing) > 3 else "")
        )
    for annotation in document["annotations"]:
        records[annotation["image_id"]]["annotations"].append(to_detectron2(annotation, ids))
    logger.info(f"{name}: {len(records)} images from {json_file}")
    return list(records.values())


def to_detectron2(annotation: dict, ids: Mapping[Any, int]) -> dict[str, Any]:
    """A tidy annotation in Detectron2's format; ``ids``: category id to contiguous id."""
    segmentation = annotation["segmentation"]
    if isinstance(segmentation, dict) and isinstance(segmentation["counts"], list):
        segmentation = mask_util.frPyObjects(segmentation, *segmentation["size"])
    return {
        "bbox": annotation["bbox"],
        "bbox_mode": BoxMode.XYWH_ABS,
        "category_id": ids[annotation["category_id"]],
        "iscrowd": annotation["iscrowd"],
        "segmentation": segmentation,
    }


def read_document(json_file: str) -> dict[str, Any]:
    """The file's content: a dict whose images, annotations and categories are lists of anything.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no json, or not of this form.
    """
    try:
        document = json.loads(Path(json_file).read_bytes())
    except FileNotFoundError:
        raise FileNotFoundError(f"no annotations file {json_file}") from None
    except ValueError as error:  # not json, not text
        raise ValueError(f"{json_file} is not a json file: {error}") from None
    for section in ("images", "annotations", "categories"):
        if not isinstance(document, dict) or not isinstance(document.get(section), list):
            raise ValueError(f"{json_file} is not a COCO json: it has no list {section!r}")
    return document


def entry_errors(document: dict[str, Any]) -> Iterator[tuple[str, int, DataError]]:
    """Entries that cannot be told apart or lack something: (section, index, error) of each.

    ``document`` is as ``read_document`` returns it.
    """
    needed: dict[str, tuple[str, ...]] = {
        "images": ("id", "file_name", "height", "width"),
        "annotations": ("id", "image_id", "category_id"),
        "categories": ("id", "name"),
    }
    for section, keys in needed.items():
        seen = set()
        for index, entry in enumerate(document[section]):
            message = ""
            lacking = [key for key in keys if not isinstance(entry, dict) or key not in entry]
            if lacking:
                kind = f"{section} without {lacking[0]!r}"
                message = f"{section}[{index}] has no {lacking[0]!r}"
            elif not all(isinstance(entry[key], Hashable) for key in keys):
                kind = f"{section} with an id that is no number or text"
                message = f"{section}[{index}] has an id that is no number or text"
            elif entry["id"] in seen:
                kind = f"{section} with the id of another one"
                message = f"the id {entry['id']} appears twice in {section!r}"
            elif section == "images" and not _is_image(entry):
                kind = "images whose file name or size is none"
                message = (
                    f"image {entry['id']}: {entry['file_name']!r}, {entry['height']!r} high and "
                    f"{entry['width']!r} wide, is no file name and size"
                )
            else:
                seen.add(entry["id"])
            if message:
                yield section, index, DataError(kind, message)
    if not document["categories"]:
        yield "categories", 0, DataError("no categories", "the file has no categories")


def _is_image(entry: dict) -> bool:
    sides = entry["height"], entry["width"]
    return isinstance(entry["file_name"], str) and all(
        isinstance(side, int) and side > 0 for side in sides
    )


def _read(json_file: str) -> dict[str, Any]:
    """The file's content; images and categories are checked."""
    document = read_document(json_file)
    for _, _, error in entry_errors(document):
        raise ValueError(f"{json_file}: {error}")
    return document


def _tidy(document: dict, json_file: str, category_ids: set) -> tuple[dict, str]:
    """A copy fit for training and evaluation, and what had to be done, "" if nothing."""
    images = {image["id"]: image for image in document["images"]}
    annotations: list[dict] = []
    skipped: Counter[str] = Counter()
    completed = 0
    for annotation in document["annotations"]:
        try:
            tidy = tidy_annotation(annotation, images, category_ids)
        except DataError as error:
            raise ValueError(f"{json_file}: {error}") from None
        if isinstance(tidy, str):
            skipped[tidy] += 1
        else:
            completed += tidy is not annotation
            annotations.append(tidy)
    remarks = []
    if skipped:
        reasons = ", ".join(f"{n} with {reason}" for reason, n in sorted(skipped.items()))
        total = len(document["annotations"])
        remarks.append(f"skipped {skipped.total()} of {total} annotations ({reasons})")
    if completed:
        remarks.append(f"completed or corrected {completed} annotations")
    # pycocotools records a match by the annotation's id in an array of floats, 0 for none
    if any(type(a["id"]) is not int or a["id"] <= 0 for a in annotations):
        annotations = [a | {"id": i} for i, a in enumerate(annotations, start=1)]
        remarks.append("numbered the annotations anew, because their ids must be positive")
    return document | {"annotations": annotations}, "; ".join(remarks)


def tidy_annotation(annotation: dict, images: Mapping[Any, dict], category_ids: set) -> dict | str:
    """The annotation itself if all is well, or a completed copy, or why it cannot be used.

    Args:
        annotation: with "id", "image_id" and "category_id".
        images: of the json, by id.
        category_ids: all that are known.

    Raises:
        DataError: it contradicts the rest of the file or has another format.
    """
    where = f"annotation {annotation['id']} of image {annotation['image_id']}"
    try:
        if annotation["image_id"] not in images:
            raise DataError("annotations of unknown images", "there is no such image")
        if annotation["category_id"] not in category_ids:
            raise DataError(
                "annotations of unknown categories",
                f"category id {annotation['category_id']} is not among the categories",
            )
        if annotation.get("ignore"):
            raise DataError(
                'annotations with "ignore"',
                'COCO metrics do not know "ignore"; use "iscrowd": 1',
            )
        return _complete(annotation, images[annotation["image_id"]])
    except (ValueError, TypeError, KeyError) as error:
        kind = error.kind if isinstance(error, DataError) else "annotations of another format"
        raise DataError(kind, f"{where}: {error}") from None


def _complete(annotation: dict, image: dict) -> dict | str:
    """See ``tidy_annotation``; raises all sorts of errors for other formats."""
    height, width = image["height"], image["width"]
    segmentation = annotation.get("segmentation")
    if not segmentation:
        return "no segmentation"
    fixes: dict[str, Any] = {}
    if isinstance(segmentation, list):
        if not all(isinstance(polygon, list) for polygon in segmentation):
            raise ValueError("its segmentation must be a list of polygons, or an RLE")
        polygons = [p for p in segmentation if len(p) >= 6 and len(p) % 2 == 0]
        if not polygons:
            return "a degenerate polygon"
        if not all(_is_drawable(polygon) for polygon in polygons):
            raise DataError(
                "polygons whose coordinates are no numbers",
                "its polygon's coordinates must be numbers of pixels",
            )
        if len(polygons) < len(segmentation):
            fixes["segmentation"] = segmentation = polygons
    else:
        counts = segmentation["counts"]
        if list(segmentation["size"]) != [height, width]:
            raise DataError(
                "masks (RLE) of another size than their image",
                f"its mask is {segmentation['size']}, but the image is [{height}, {width}]",
            )
        runs = counts if isinstance(counts, list) else _decompress(counts)
        # pycocotools fills what a truncated RLE leaves open with whatever is in memory
        if sum(runs) != height * width or min(runs) < 0:
            raise DataError(
                "masks (RLE) whose runs do not add up to the image",
                "the runs of its RLE do not add up to the image",
            )
        if not mask_util.area(to_rle(segmentation, height, width)):
            return "an empty mask"
    if annotation.get("iscrowd") is None:
        fixes["iscrowd"] = 0
    if annotation.get("area") is None:
        fixes["area"] = float(mask_util.area(to_rle(segmentation, height, width)))
    box = annotation.get("bbox")
    if box is None:
        box = fixes["bbox"] = mask_util.toBbox(to_rle(segmentation, height, width)).tolist()
    if len(box) != 4 or not all(isinstance(value, Real) for value in box):
        raise ValueError(f"its bbox {box} is not [x, y, width, height]")
    x, y, w, h = box
    if not (w > 0 and h > 0):  # NaN too
        return "a box without area"
    if not (x < width and y < height and x + w > 0 and y + h > 0):
        return "a box outside of the image"
    return annotation | fixes if fixes else annotation


def _is_drawable(polygon: list) -> bool:
    return bool((np.abs(np.asarray(polygon, dtype=float)) <= _LARGEST_COORDINATE).all())  # not NaN


def _decompress(counts: str | bytes) -> list[int]:
    """The runs of a compressed RLE: five bits a character; the fourth and later as differences."""
    runs: list[int] = []
    value = shift = 0
    for character in counts.encode() if isinstance(counts, str) else counts:
        bits = character - 48
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:  # more to come
            continue
        if bits & 16:  # the sign
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    return runs


def to_rle(segmentation: Any, height: int, width: int) -> dict:
    """Compressed RLE of a polygon list or an RLE."""
    if isinstance(segmentation, list):
        return mask_util.merge(mask_util.frPyObjects(segmentation, height, width))
    if isinstance(segmentation["counts"], list):
        return mask_util.frPyObjects(segmentation, height, width)
    return segmentation


def _write_copy(json_file: str, document: dict, variant: str) -> str:
    """Write a changed file to the cache folder, named by its source's content and the variant."""
    digest = hashlib.sha256(Path(json_file).read_bytes()).hexdigest()[:16]
    folder = cache_folder() / "tidied"
    folder.mkdir(parents=True, exist_ok=True)
    copy = folder / f"{Path(json_file).stem}-{variant}-{digest}.json"
    if not copy.exists():
        # renamed into place: several processes may write it at once
        unfinished = copy.with_suffix(f".{os.getpid()}")
        unfinished.write_text(json.dumps(document))
        unfinished.replace(copy)
    return str(copy)
