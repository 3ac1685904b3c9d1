"""Data sets in Detectron2's catalogs: users' COCO json files, named folders, subsets.

Data sets that others registered are never replaced.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog

from solo_d2.files import atomic_write

from .cache import cache_folder
from .coco import REPAIRED, SKIPPED, CocoFile, read_coco, to_records
from .images import ImageError, read_header

logger = logging.getLogger(__name__)

DATASETS_HINT = (
    "Set DETECTRON2_DATASETS to the folder that has the data sets, or pass your own with --data"
)


@dataclass(eq=False)
class Loader:
    """The function that ``DatasetCatalog`` calls to load a data set of ours."""

    name: str

    def set_metadata(self, **values: Any) -> None:
        """Set metadata, replacing earlier values, which Detectron2's ``set`` refuses."""
        vars(MetadataCatalog.get(self.name)).update(values)


class CocoLoader(Loader):
    """Loads a COCO json. If the file needs repairs, the evaluator reads a repaired copy."""

    def __init__(self, name: str, source: Callable[[], tuple[Path, Path]], **options: bool):
        """
        Args:
            name: name of the data set.
            source: returns the json file and the image folder when the set is loaded.
            options: masks, crowd_is_object; see ``read_coco``.
        """
        super().__init__(name)
        self.source = source
        self.options = options
        self._read: tuple[Any, CocoFile] | None = None  # (identity of the file, its content)

    def __call__(self) -> list[dict[str, Any]]:
        coco, image_root = self.read()
        records = to_records(coco, str(image_root))
        check_images_exist(records, f"{self.name} ({self.source()[0]})")
        logger.info(f"{self.name}: {len(records)} images from {self.source()[0]}")
        return records

    def read(self) -> tuple[CocoFile, Path]:
        """The repaired content and the image folder; both are also set in the metadata.

        Raises:
            FileNotFoundError, ValueError: see ``read_coco``; or the set was registered with
                other classes than those in the file.
        """
        json_file, image_root = self.source()
        stat = json_file.stat() if json_file.exists() else None
        key = (json_file, image_root, stat and (stat.st_mtime_ns, stat.st_size))
        metadata = MetadataCatalog.get(self.name)
        if self._read and self._read[0] == key and os.path.isfile(metadata.get("json_file", "")):
            return self._read[1], image_root
        coco = read_coco(json_file, image_root, **self.options)
        expected = metadata.get("thing_classes", coco.classes)
        if coco.classes != expected:
            raise ValueError(
                f"{json_file}: data set {self.name!r} has the classes {expected}, the file "
                f"{coco.classes}"
            )
        copy = write_document(json_file, coco.document) if coco.changed else str(json_file)
        self.set_metadata(
            json_file=copy,
            image_root=str(image_root),
            thing_classes=coco.classes,
            thing_dataset_id_to_contiguous_id=coco.ids,
        )
        effects = [(effect, coco.counts(effect)) for effect in (REPAIRED, SKIPPED)]
        if remarks := "; ".join(f"{effect} {counts}" for effect, counts in effects if counts):
            logger.warning(f"{json_file}: {remarks}. Training and evaluation read {copy}")
        self._read = key, coco
        return coco, image_root


@dataclass(eq=False)
class SubsetLoader(Loader):
    """A few images of another data set."""

    parent: str  # name of the whole set
    which: int | Sequence[int]  # how many of the first images with objects, or image ids

    def __call__(self) -> list[dict[str, Any]]:
        """
        Raises:
            ValueError: the whole set has fewer such images.
        """
        records, which = DatasetCatalog.get(self.parent), self.which
        if isinstance(which, int):
            kind, wanted = "with objects", which
            records = [r for r in records if _has_objects(r)][:wanted]
        else:
            kind, wanted = f"with the ids {which}", len(which)
            records = [r for r in records if r["image_id"] in which]
        if len(records) < wanted:
            raise ValueError(
                f"data set {self.parent!r} has {len(records)} images {kind}, not {wanted}"
            )
        metadata = MetadataCatalog.get(self.parent).as_dict()
        if "json_file" in metadata:
            document = json.loads(Path(metadata["json_file"]).read_bytes())
            chosen = {r["image_id"] for r in records}
            for section, key in (("images", "id"), ("annotations", "image_id")):
                document[section] = [x for x in document[section] if x[key] in chosen]
            metadata["json_file"] = write_document(metadata["json_file"], document)
        del metadata["name"]
        self.set_metadata(**metadata)
        return records


def _has_objects(record: dict[str, Any]) -> bool:
    return any(not a.get("iscrowd", 0) for a in record.get("annotations", ()))


def enter(loader: Loader, **metadata: Any) -> None:
    """Register a data set of ours, replacing one of ours with that name.

    Raises:
        ValueError: somebody else registered the name.
    """
    if not is_free(loader.name):
        raise ValueError(f"a data set {loader.name!r} is registered already; use another name")
    _forget(loader.name)
    DatasetCatalog.register(loader.name, loader)
    loader.set_metadata(evaluator_type="coco", **metadata)


def _forget(name: str) -> None:
    DatasetCatalog.pop(name, None)
    MetadataCatalog.pop(name, None)


def source_file(name: str) -> str:
    """The original json file of a data set, even if the evaluator reads a repaired copy."""
    loader = DatasetCatalog.data.get(name)
    if isinstance(loader, CocoLoader):
        return str(loader.source()[0])
    return str(MetadataCatalog.get(name).get("json_file"))


def is_free(name: str) -> bool:
    """Whether the name is unused, or used by a data set of ours."""
    return isinstance(DatasetCatalog.data.get(name), Loader | None)


def register_coco_json(
    name: str,
    json_file: str | Path,
    image_root: str | Path,
    *,
    masks: bool = True,
    crowd_is_object: bool = False,
) -> CocoFile:
    """Register a COCO json; its categories, in the order of their ids, are the classes.

    The file is read and checked now; its images are looked for when the set is loaded. Unambiguous
    errors are repaired and annotations without a mask are skipped, with one warning that counts
    them. In that case the metadata's ``json_file``, which the evaluator reads, is a repaired copy
    in the cache folder.

    Args:
        name: name of the data set; one that this function registered before is replaced.
        json_file: in the format of COCO's instances_*.json.
        image_root: the folder that the json's file names are relative to.
        masks, crowd_is_object: see ``read_coco``.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: the file's content is refused (the message names the file and the entry), or
            somebody else registered the name.
    """
    json_file, image_root = Path(json_file), Path(image_root)
    if not image_root.is_dir():
        raise FileNotFoundError(f"no image folder {image_root} (for data set {name!r})")
    loader = CocoLoader(
        name, lambda: (json_file, image_root), masks=masks, crowd_is_object=crowd_is_object
    )
    enter(loader)
    try:
        return loader.read()[0]
    except (OSError, ValueError):
        _forget(name)
        raise


def register_named_sets() -> None:
    """Register the data sets that ``configs`` use, unless their names are taken.

    Each is a folder in $DETECTRON2_DATASETS (default "datasets"), read when the set is loaded.
    """
    coco = list(MetadataCatalog.get("coco_2017_val").thing_classes)
    for folder, classes, year in (
        ("coco_mini", coco, "2017"),
        ("nuclei", ["nucleus"], ""),
        ("pennfudan", ["pedestrian"], ""),
    ):
        for split in ("train", "val"):
            name = f"{folder}_{split}"
            if name not in DatasetCatalog:
                source = partial(folder_files, partial(named_folder, folder), split + year)
                enter(CocoLoader(name, source), thing_classes=classes)
    for subset, parent, which in (
        ("coco_mini_overfit8", "coco_mini_train", 8),
        # the first four of 360 x 360 pixels: 85 nuclei, half of them wider than 40 pixels
        ("nuclei_overfit4", "nuclei_train", (7, 9, 10, 13)),
    ):
        if subset not in DatasetCatalog:
            metadata = MetadataCatalog.get(parent).as_dict()
            known = {key: metadata[key] for key in ("thing_classes",) if key in metadata}
            enter(SubsetLoader(subset, parent, which), **known)


def folder_files(folder: Callable[[], Path], split: str) -> tuple[Path, Path]:
    """The json file and the image folder of a split, in a folder like COCO's."""
    root = folder()
    return root / "annotations" / f"instances_{split}.json", root / split


def named_folder(name: str) -> Path:
    """
    Raises:
        FileNotFoundError: $DETECTRON2_DATASETS has no such folder.
    """
    root = datasets_folder() / name
    if not root.is_dir():
        raise FileNotFoundError(f"no data set folder {root}. {DATASETS_HINT}")
    return root


def datasets_folder() -> Path:
    """$DETECTRON2_DATASETS, by default "datasets", as for Detectron2's own sets."""
    return Path(os.environ.get("DETECTRON2_DATASETS", "datasets")).expanduser()


def find_path(path: str, key: str) -> Path:
    """The path itself if it exists, else under $DETECTRON2_DATASETS.

    Args:
        path: of a file or folder.
        key: the config key that it is from, for the error.

    Raises:
        FileNotFoundError: it is in neither place.
    """
    given = Path(path).expanduser()
    candidates = dict.fromkeys([given, datasets_folder() / given])
    for candidate in candidates:
        if candidate.exists():
            return candidate
    raise FileNotFoundError(f"{key}: there is no {' nor '.join(map(str, candidates))}")


def check_images_exist(records: Sequence[dict[str, Any]], source: str) -> None:
    """Check that the image files of data set records exist.

    Raises:
        FileNotFoundError: some are missing; the message counts them and names the first.
    """
    missing = [r["file_name"] for r in records if not os.path.isfile(r["file_name"])]
    if missing:
        first = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise FileNotFoundError(
            f"{source}: {len(missing)} of {len(records)} images are missing: {first}"
        )


def check_image_headers(records: Sequence[dict[str, Any]]) -> None:
    """Compare the sizes of image files with the records, without decoding them.

    Raises:
        ValueError: a file is not an image or has another size; the message names it.
    """
    for record in records:
        name, stated = record["file_name"], (record["width"], record["height"])
        try:
            size = read_header(name).size
        except ImageError as error:
            raise ValueError(f"image {name}: {error}") from error
        if size != stated:
            raise ValueError(
                f"image {name}: {size[0]} x {size[1]} pixels, but the json says "
                f"{stated[0]} x {stated[1]}"
            )


def write_document(json_file: str | Path, document: dict[str, Any]) -> str:
    """Write a document to the cache folder, named after source and content; returns the path."""
    content = json.dumps(document).encode()
    digest = hashlib.sha256(content).hexdigest()[:16]
    copy = cache_folder() / "annotations" / f"{Path(json_file).stem}-{digest}.json"
    if not copy.exists():
        copy.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(copy) as file:
            file.write(content)
    return str(copy)
