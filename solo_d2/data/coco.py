"""The only reader of COCO json files: it repairs unambiguous errors and refuses the rest.

Detectron2's ``load_coco_json`` silently drops some annotations and fails with an assertion on
others, and its evaluator reads the file again by itself. Here training, evaluation and the check
all use the document that ``read_coco`` returns.
"""

import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pycocotools.mask as mask_util
from detectron2.structures import BoxMode

from .annotations import (
    REFUSED,
    REPAIRED,
    SKIPPED,
    Fault,
    box_of,
    box_of_mask,
    flag,
    identity,
    mask_of,
    number,
    show,
    to_rle,
    whole,
)

# pycocotools stores ids in float64 and pixel counts in 32 bits.
_LARGEST_ID = 2**53
_LARGEST_IMAGE = 2**31
# COCO itself has 1 % crowds. Brush tools mark each of their masks as a crowd.
_USUAL_CROWDS = 0.05


class CocoFile(NamedTuple):
    """The result of ``read_coco``."""

    document: dict[str, Any]  # repaired; ids are whole numbers
    classes: list[str]
    ids: dict[int, int]  # category id -> index into ``classes``
    findings: dict[tuple[str, str], list[str]]  # (effect, what) -> the faulty entries
    changed: bool  # whether the document differs from the file

    @property
    def objects(self) -> int:
        """Number of annotations that are not crowds."""
        return sum(not a["iscrowd"] for a in self.document["annotations"])

    def counts(self, effect: str) -> str:
        """The findings of one effect, counted: "boxes missing, taken from the masks: 2; ..."."""
        found = [(what, len(who)) for (e, what), who in self.findings.items() if e == effect]
        return "; ".join(f"{what}: {count}" for what, count in found)


def read_coco(
    json_file: str | Path,
    image_root: str | Path = "",
    *,
    masks: bool = True,
    crowd_is_object: bool = False,
    tolerant: bool = False,
) -> CocoFile:
    """Read, check and repair a COCO json.

    Args:
        json_file: in the format of COCO's instances_*.json.
        image_root: the folder that the json's file names are relative to.
        masks: whether each annotation needs a mask; otherwise a box is enough.
        crowd_is_object: treat every "iscrowd" as 0. Brush tools write 1 for single objects.
        tolerant: skip entries that would be refused and list them among the findings.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a COCO json, or an entry is refused; the message names the file, the
            entry and the field.
    """
    document, plain = _parse(Path(json_file))
    reader = _Reader(Path(json_file), document, Path(image_root), masks, crowd_is_object, tolerant)
    return reader.read(plain)


def to_records(coco: CocoFile, image_root: str) -> list[dict[str, Any]]:
    """The content of a file in Detectron2's data set format."""
    records = {
        image["id"]: {
            "file_name": os.path.join(image_root, image["file_name"]),
            "height": image["height"],
            "width": image["width"],
            "image_id": image["id"],
            "annotations": [],
        }
        for image in coco.document["images"]
    }
    for annotation in coco.document["annotations"]:
        record = {
            "bbox": annotation["bbox"],
            "bbox_mode": BoxMode.XYWH_ABS,
            "category_id": coco.ids[annotation["category_id"]],
            "iscrowd": annotation["iscrowd"],
        }
        segmentation = annotation.get("segmentation")
        if segmentation:
            if isinstance(segmentation, dict) and isinstance(segmentation["counts"], list):
                segmentation = mask_util.frPyObjects(segmentation, *segmentation["size"])
            record["segmentation"] = segmentation
        records[annotation["image_id"]]["annotations"].append(record)
    return list(records.values())


def _parse(path: Path) -> tuple[dict[str, Any], bool]:
    """The document, and whether pycocotools can read the file too: UTF-8 without a BOM."""
    try:
        content = path.read_bytes()
        document = json.loads(content)  # detects UTF-8, 16 and 32, with or without a BOM
    except FileNotFoundError:
        raise FileNotFoundError(f"no annotations file {path}") from None
    except RecursionError:
        raise ValueError(f"{path} is not a COCO json file: it is nested too deeply") from None
    except ValueError as error:  # not json, not text
        raise ValueError(f"{path} is not a json file: {error}") from None
    for section in ("images", "annotations", "categories"):
        if not isinstance(document, dict) or not isinstance(document.get(section), list):
            raise ValueError(f"{path} is not a COCO json: it has no list {section!r}")
    return document, json.detect_encoding(content) == "utf-8"


@dataclass
class _Reader:
    """One pass over a document; see ``read_coco``."""

    json_file: Path
    document: dict[str, Any]
    image_root: Path
    masks: bool
    crowd_is_object: bool
    tolerant: bool
    findings: dict[tuple[str, str], list[str]] = field(default_factory=dict)

    def read(self, plain: bool) -> CocoFile:
        if not plain:
            self._add(REPAIRED, "files that are not plain UTF-8, converted", "the whole file")
        images = self._images()
        categories = self._categories()
        if not self.document["categories"]:
            self._add(REFUSED, "no categories", "the whole file")
        annotations = self._annotations(images, categories)
        crowds = [a for a in annotations if a["iscrowd"]]
        if len(crowds) > _USUAL_CROWDS * len(annotations):
            what = (
                "crowd regions (iscrowd 1; set DATASETS.CUSTOM.CROWD_IS_OBJECT True if they are "
                "single objects, as brush tools write them)"
            )
            for annotation in crowds:
                self._add(SKIPPED, what, f"annotation {annotation['id']}")
        document = self.document | {
            "images": list(images.values()),
            "annotations": annotations,
            "categories": list(categories.values()),
        }
        order = sorted(categories.values(), key=lambda category: category["id"])
        return CocoFile(
            document,
            [category["name"] for category in order],
            {category["id"]: i for i, category in enumerate(order)},
            self.findings,
            changed=any(effect == REPAIRED for effect, _ in self.findings)
            or document != self.document,
        )

    def _add(self, effect: str, what: str, who: str) -> None:
        if effect == REFUSED and not self.tolerant:
            raise ValueError(f"{self.json_file}: {what}: {who}") from None
        self.findings.setdefault((effect, what), []).append(who)

    def _entries(self, section: str, *needed: str) -> Iterator[tuple[str, dict[str, Any]]]:
        for index, entry in enumerate(self.document[section]):
            where = f"{section}[{index}]"
            missing = [k for k in needed if not isinstance(entry, dict) or entry.get(k) is None]
            if missing:
                self._add(REFUSED, f"{section} without {missing[0]!r}", where)
            else:
                yield where, entry

    def _known(self, section: str, *needed: str) -> Iterator[tuple[Any, dict[str, Any]]]:
        """(id, entry) of the entries that have a unique id."""
        seen = set()
        for where, entry in self._entries(section, "id", *needed):
            key = identity(entry["id"])
            if key is None:
                what = f"{section} whose id is neither a number nor a text"
                self._add(REFUSED, what, f"{where} (id {show(entry['id'])})")
            elif key in seen:
                self._add(REFUSED, f"{section} with the same id as another one", f"id {show(key)}")
            else:
                seen.add(key)
                yield key, entry

    def _numbered(self, section: str, entries: dict[Any, dict]) -> dict[Any, dict]:
        """Entries by their key in the file, with ids that pycocotools can handle."""
        renumber = any(type(key) is not int or not 0 <= key <= _LARGEST_ID for key in entries)
        result = {}
        for count, (key, entry) in enumerate(entries.items(), start=1):
            new = count if renumber else key
            if new != entry["id"] or type(entry["id"]) is not int:
                change = "renumbered" if renumber else "converted"
                what = f"{section} whose ids are not whole numbers of 0 or more, {change}"
                self._add(REPAIRED, what, show(entry["id"]))
                entry = entry | {"id": new}
            result[key] = entry
        return result

    # --- images and categories

    def _images(self) -> dict[Any, dict]:
        images = {}
        for key, entry in self._known("images", "file_name", "height", "width"):
            name, sides = entry["file_name"], {k: whole(entry[k]) for k in ("height", "width")}
            height, width = sides["height"] or 0, sides["width"] or 0
            if not (isinstance(name, str) and name and min(height, width) > 0) or (
                height * width > _LARGEST_IMAGE or not _is_path(name)
            ):
                values = (f"{k} {show(entry[k])}" for k in ("file_name", "height", "width"))
                what = "images whose file name or size is invalid"
                self._add(REFUSED, what, f"image {show(key)} ({', '.join(values)})")
                continue
            if any(type(entry[k]) is not int for k in sides):
                self._add(REPAIRED, "image sizes that are not integers, converted", name)
            if "\\" in name and not (self.image_root / name).exists():
                self._add(REPAIRED, "file names with backslashes, replaced by slashes", name)
                name = name.replace("\\", "/")
            images[key] = entry | {"file_name": name, **sides}
        return self._numbered("images", images)

    def _categories(self) -> dict[Any, dict]:
        categories: dict[Any, dict] = {}
        names: set[str] = set()
        for key, entry in self._known("categories", "name"):
            name = entry["name"]
            if type(name) in (int, float):
                self._add(REPAIRED, "category names that are numbers, taken as texts", str(name))
                name = str(name)
            if not isinstance(name, str):
                what = "categories whose name is not a text"
                self._add(REFUSED, what, f"category {show(key)} (name {show(name)})")
                continue
            if name in names:
                what = "categories with the same name as another one, distinguished by their ids"
                self._add(REPAIRED, what, f"{name} ({key})")
                name = f"{name} ({key})"
            names.add(name)
            categories[key] = entry | {"name": name}
        return self._numbered("categories", categories)

    # --- annotations

    def _annotations(self, images: dict[Any, dict], categories: dict[Any, dict]) -> list[dict]:
        annotations = []
        for where, entry in self._entries("annotations", "image_id", "category_id"):
            if entry.get("id") is not None:
                where = f"annotation {show(entry['id'])} of image {show(entry['image_id'])}"
            repairs: list[str] = []
            try:
                annotations.append(self._repair(entry, images, categories, repairs))
            except Fault as fault:
                detail = f" ({fault.detail})" if fault.detail else ""
                self._add(fault.effect, fault.what, where + detail)
                continue
            for what in repairs:
                self._add(REPAIRED, what, where)
        return self._with_ids(annotations)

    def _with_ids(self, annotations: list[dict]) -> list[dict]:
        """Renumber ids if needed: pycocotools stores matches by id, as floats, with 0 for none."""
        ids = [a.get("id") for a in annotations]
        times = Counter(i for i in ids if type(i) is int and 0 < i <= _LARGEST_ID)
        if times.total() == len(ids) == len(times):
            return annotations
        what = "annotation ids missing, repeated or not positive, all renumbered"
        for value in ids:
            if type(value) is not int or times[value] != 1:
                self._add(REPAIRED, what, f"annotation {show(value)}")
        return [a | {"id": i} for i, a in enumerate(annotations, start=1)]

    def _repair(
        self,
        entry: dict,
        images: dict[Any, dict],
        categories: dict[Any, dict],
        repairs: list[str],
    ) -> dict:
        image, category = (identity(entry[key]) for key in ("image_id", "category_id"))
        if image not in images:
            raise Fault("annotations of unknown images")
        if category not in categories:
            detail = f"category_id {show(entry['category_id'])}"
            raise Fault("annotations of unknown categories", detail)
        if type(entry["image_id"]) is not int or type(entry["category_id"]) is not int:
            repairs.append("annotations that refer to ids of another type, converted")
        height, width = images[image]["height"], images[image]["width"]
        repaired = entry | {
            "image_id": images[image]["id"],
            "category_id": categories[category]["id"],
            "iscrowd": self._crowd_flag(entry, repairs),
        }
        mask_box = area = None
        try:
            segmentation = mask_of(entry.get("segmentation"), height, width, repairs)
        except Fault as fault:
            if self.masks or fault.effect == REFUSED:
                raise
            repaired.pop("segmentation", None)
        else:
            rle = to_rle(segmentation, height, width)
            mask_box, area = box_of_mask(segmentation, rle), float(mask_util.area(rle))
            repaired["segmentation"] = segmentation
        repaired["bbox"] = box_of(entry.get("bbox"), mask_box, height, width, repairs)
        stated = number(entry.get("area"))
        if stated is None or not 0 < stated <= height * width:
            source = "masks" if area else "boxes"
            state = "missing" if entry.get("area") is None else "that are not a number of pixels"
            repairs.append(f"areas {state}, taken from the {source}")
            stated = area or repaired["bbox"][2] * repaired["bbox"][3]
        elif isinstance(entry["area"], str):
            repairs.append("areas that are texts, converted")
        return repaired | {"area": stated}

    def _crowd_flag(self, entry: dict, repairs: list[str]) -> int:
        value = entry.get("iscrowd")
        is_crowd = 0 if value is None else flag(value)
        if is_crowd is None:
            raise Fault("annotations whose iscrowd is neither 0 nor 1", show(value))
        if value is None:
            repairs.append("iscrowd missing, taken as 0")
        elif type(value) is not int or value != is_crowd:
            repairs.append("iscrowd not 0 or 1, converted")
        if is_crowd and self.crowd_is_object:
            repairs.append("crowds taken as objects (DATASETS.CUSTOM.CROWD_IS_OBJECT)")
            is_crowd = 0
        if entry.get("ignore") is not None and flag(entry["ignore"]) != 0:
            raise Fault('annotations with "ignore", unknown to COCO metrics (use "iscrowd": 1)')
        return is_crowd


def _is_path(name: str) -> bool:
    """False for names with NUL or with characters that the file system cannot encode."""
    try:
        return b"\0" not in os.fsencode(name)
    except UnicodeEncodeError:
        return False
