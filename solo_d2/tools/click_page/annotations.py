"""The COCO json that the page reads and writes."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import Any

import pycocotools.mask as mask_util

from solo_d2.data.annotations import to_rle
from solo_d2.data.coco import SKIPPED, read_coco
from solo_d2.errors import UserError
from solo_d2.files import atomic_write

from .segmenter import describe, rle_of


class AnnotationFile:
    """A data set that grows image by image.

    Objects that a user has not changed, crowds, and boxes without masks stay as they are.
    """

    def __init__(self, path: Path, image_root: Path, classes: dict[str, int]):
        """
        Args:
            path: an existing file is continued, a new one is written by ``save``.
            image_root: the folder that file names are relative to.
            classes: name -> category id of the classes offered besides those of the file. If the
                file has the id already, a free one is taken.

        Raises:
            ValueError: the existing file is not a COCO json, or has an invalid entry.
        """
        self.path = path
        self._lock = Lock()
        self.skipped = ""  # entries of the file that are not shown
        if path.exists():
            coco = read_coco(path, image_root, masks=False)
            self._document, self.skipped = coco.document, coco.counts(SKIPPED)
        else:
            categories = [{"id": i, "name": name} for name, i in classes.items()]
            self._document = {"images": [], "annotations": [], "categories": categories}
        self._ids = {c["name"]: c["id"] for c in self._document["categories"]}
        for name, wanted in classes.items():
            taken = set(self._ids.values())
            self._ids.setdefault(name, max(taken) + 1 if wanted in taken else wanted)

    @property
    def classes(self) -> list[str]:
        """The names that objects may have."""
        return list(self._ids)

    def counts(self) -> dict[str, int]:
        """File name -> number of objects, for each image in the file."""
        images = {image["id"]: _name(image) for image in self._document["images"]}
        counts = dict.fromkeys(images.values(), 0)
        for annotation in self._document["annotations"]:
            counts[images[annotation["image_id"]]] += _is_editable(annotation)
        return counts

    def objects(self, file_name: str, size: tuple[int, int]) -> list[dict[str, Any]]:
        """The objects of an image: "id", "class", "area", "box" and "counts" of each.

        Args:
            file_name: relative to the folder.
            size: height and width of the image.

        Raises:
            UserError: the file states another size.
        """
        image = self._image(file_name)
        if image and (image["height"], image["width"]) != size:
            stated = f"{image['width']} x {image['height']}"
            raise UserError(f"{file_name} is {size[1]} x {size[0]}, in {self.path} it is {stated}")
        names = {number: name for name, number in self._ids.items()}
        found = []
        for annotation in self._annotations(image):
            if _is_editable(annotation):
                mask = mask_util.decode(to_rle(annotation["segmentation"], *size)).astype(bool)
                name = names[annotation["category_id"]]
                found.append({"id": annotation["id"], "class": name, **describe(mask)})
        return found

    def save(
        self, file_name: str, size: tuple[int, int], objects: Sequence[dict[str, Any]]
    ) -> None:
        """Replace the objects of an image and write the file.

        Args:
            file_name, size: see ``objects``.
            objects: "class" and "counts" of each, and "id" if its mask is that of the file.

        Raises:
            ValueError: a class is unknown or a mask is invalid.
        """
        with self._lock:
            document = self._document
            image = self._image(file_name) or {
                "id": _next_id(document["images"]),
                "file_name": file_name,
                "height": size[0],
                "width": size[1],
            }
            old = {a["id"]: a for a in self._annotations(image)}
            kept = [a for a in old.values() if not _is_editable(a)]
            number = _next_id(document["annotations"])
            for item in objects:
                annotation = old.get(item.get("id"))
                if annotation is None:
                    annotation = {"id": number, "image_id": image["id"], "iscrowd": 0}
                    annotation |= _mask_entries(rle_of(item.get("counts"), *size))
                    number += 1
                kept.append(annotation | {"category_id": self._id_of(item.get("class"))})
            others = [a for a in document["annotations"] if a["image_id"] != image["id"]]
            used = {annotation["category_id"] for annotation in kept}
            known = {category["id"] for category in document["categories"]}
            more = [{"id": i, "name": n} for n, i in self._ids.items() if i in used - known]
            changed = document | {
                "images": [x for x in document["images"] if x is not image] + [image],
                "annotations": others + kept,
                "categories": document["categories"] + more,
            }
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(self.path) as file:
                file.write(json.dumps(changed).encode())
            self._document = changed

    def _id_of(self, name: Any) -> int:
        if not isinstance(name, str) or name not in self._ids:
            raise ValueError(f"there is no class {name!r}")
        return self._ids[name]

    def _image(self, file_name: str) -> dict[str, Any] | None:
        return next((x for x in self._document["images"] if _name(x) == file_name), None)

    def _annotations(self, image: dict[str, Any] | None) -> list[dict[str, Any]]:
        number = image["id"] if image else None
        return [a for a in self._document["annotations"] if a["image_id"] == number]


def _name(image: dict[str, Any]) -> str:
    return os.path.normpath(image["file_name"]).replace(os.sep, "/")


def _is_editable(annotation: dict[str, Any]) -> bool:
    return not annotation["iscrowd"] and bool(annotation.get("segmentation"))


def _next_id(entries: Sequence[dict[str, Any]]) -> int:
    return max((entry["id"] for entry in entries), default=0) + 1


def _mask_entries(rle: dict[str, Any]) -> dict[str, Any]:
    return {
        "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()},
        "area": int(mask_util.area(rle)),
        "bbox": mask_util.toBbox(rle).tolist(),
    }
