"""Checking data sets before training: ``solo-d2 check --help``."""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pycocotools.mask as mask_util
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from solo_d2.arguments import parse, print_error
from solo_d2.config import load_config
from solo_d2.data.annotations import to_rle
from solo_d2.data.catalog import CocoLoader
from solo_d2.data.coco import REFUSED, REPAIRED, CocoFile, read_coco, to_records
from solo_d2.data.images import orientation, read_image
from solo_d2.data.setup import class_mismatch, find_custom, register_shapes
from solo_d2.errors import UserError, one_line
from solo_d2.files import atomic_write

from .check_report import (
    REMARK,
    Cells,
    Report,
    has_problems,
    quantiles,
    size_row,
    summary,
    to_json,
    to_text,
)
from .occupancy import Grids, NetworkInput, advise, occupancy

EXIT_CLEAN, EXIT_PROBLEMS, EXIT_USAGE = 0, 1, 2

SOLO_FAMILY = ("SOLO", "DecoupledSOLO", "SOLOv2")

# Pixels by which a polygon may extend beyond the image without a remark.
_TOLERANCE = 2.0


class Source(NamedTuple):
    """A data set to check."""

    name: str
    keys: list[str]  # the config keys that name it
    json_file: Path
    image_root: Path
    classes: list[str] | None = None  # the classes that it is registered with
    crowd_is_object: bool = False


def check(cfg: CfgNode, *, decode_images: bool = False) -> list[Report]:
    """Check every data set of a config; an invalid set does not end the check.

    Args:
        cfg: if DATASETS.CUSTOM is set, it replaces DATASETS.TRAIN and TEST.
        decode_images: read all pixels; otherwise only the images' headers.

    Raises:
        UserError: the config names no data set, or one that is unknown or not in COCO's format.
        FileNotFoundError, ValueError: a file that the config names is missing, or settings
            contradict each other.
    """
    sources = find_sources(cfg)
    grids = None
    network_input = NetworkInput(cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)
    if cfg.MODEL.META_ARCHITECTURE in SOLO_FAMILY:
        grids, network_input = Grids.from_config(cfg), NetworkInput.from_config(cfg)
    reports = []
    paths: dict[str, dict[str, Path]] = {}
    classes: dict[str, list[str]] = {}
    for source in sources:
        report = Report(source.name, source.keys, str(source.json_file), str(source.image_root))
        reports.append(report)
        coco = _read(report, source, masks=cfg.MODEL.MASK_ON)
        if coco is None:
            continue
        classes[f"{source.name!r} ({source.json_file})"] = coco.classes
        images = coco.document["images"]
        paths[source.name] = _check_images(report, images, source.image_root, decode_images)
        _check_annotations(report, coco)
        if report.is_training and cfg.MODEL.MASK_ON and cfg.INPUT.MASK_FORMAT == "polygon":
            _check_polygons_only(report, coco)
        _count(report, coco, network_input)
        if grids:
            features = list(cfg.MODEL.SOLO.IN_FEATURES)
            report.cells = _count_cells(report, coco, grids, network_input, features)
    mismatch = class_mismatch(classes)
    if mismatch:
        reports[-1].add(REFUSED, "data sets with other classes", mismatch)
    training = [report for report in reports if report.is_training]
    if training and not any(report.objects for report in training):
        training[0].add(REFUSED, "training data without objects", training[0].json_file)
    for train in training:
        for test in reports:
            if "DATASETS.TEST" in test.keys and {train.name, test.name} <= paths.keys():
                _check_overlap(train, test, paths)
    return reports


def find_sources(cfg: CfgNode) -> list[Source]:
    """The data sets that ``setup_datasets`` would register, without reading their files.

    Raises:
        UserError, FileNotFoundError, ValueError: see ``check``.
    """
    register_shapes(cfg)
    custom = find_custom(cfg)
    if any(custom.values()):
        keys = {"TRAIN": "DATASETS.TRAIN", "VAL": "DATASETS.TEST"}
        as_object = cfg.DATASETS.CUSTOM.CROWD_IS_OBJECT
        return [
            Source(found.name, [keys[split]], found.json_file, found.image_root, None, as_object)
            for split, found in custom.items()
            if found
        ]
    keys_of: dict[str, list[str]] = {}
    for key in ("DATASETS.TRAIN", "DATASETS.TEST"):
        for name in cfg.DATASETS[key.split(".")[1]]:
            keys_of.setdefault(name, []).append(key)
    if not keys_of:
        raise UserError("the config names no data set in DATASETS.TRAIN, TEST or CUSTOM")
    return [_registered(name, keys) for name, keys in keys_of.items()]


def _registered(name: str, keys: list[str]) -> Source:
    if name not in DatasetCatalog:
        raise UserError(f"{keys[0]}: there is no data set {name!r}")
    loader, metadata = DatasetCatalog.data[name], MetadataCatalog.get(name)
    if isinstance(loader, CocoLoader):  # the original file, not the repaired copy
        json_file, image_root = loader.source()  # draws an embedded data set
        as_object = loader.options["crowd_is_object"]
        classes = metadata.get("thing_classes")
        return Source(name, keys, json_file, image_root, classes, as_object)
    if "json_file" not in metadata.as_dict():
        DatasetCatalog.get(name)
    files = metadata.get("json_file"), metadata.get("image_root")
    if not files[0] or files[1] is None:
        raise UserError(f"{keys[0]}: {name!r} is not a COCO json, the only supported format")
    return Source(name, keys, Path(files[0]), Path(files[1]), metadata.get("thing_classes"))


def _read(report: Report, source: Source, *, masks: bool) -> CocoFile | None:
    """The content that the reader accepts; its findings are added to the report."""
    try:
        coco = read_coco(
            source.json_file,
            source.image_root,
            masks=masks,
            crowd_is_object=source.crowd_is_object,
            tolerant=True,
        )
    except ValueError as error:
        report.add(REFUSED, "file that is not a COCO json", one_line(error))
        return None
    for (effect, what), offenders in coco.findings.items():
        report.findings[effect, what] = offenders
    if source.classes is not None and source.classes != coco.classes:
        expected = {"the data set as registered": source.classes, report.json_file: coco.classes}
        report.add(
            REFUSED,
            "file with other classes than the registered data set",
            class_mismatch(expected),
        )
    return coco


def _check_images(report: Report, images: list[dict], root: Path, decode: bool) -> dict[str, Path]:
    """Check the image files; returns their paths by file name in the json."""
    report.images = len(images)
    if not images:
        report.add(REFUSED, "data set without images", report.json_file)
    paths: dict[str, Path] = {}
    for image in images:
        name = image["file_name"]
        if name in paths:
            report.add(REMARK, "images listed more than once", name)
        if os.path.isabs(name) or ".." in Path(name).parts:
            report.add(REMARK, "file names that lead out of the image folder", name)
        paths[name] = root / name
    if not root.is_dir():
        report.add(REFUSED, "missing image folder", str(root))
        return paths
    for image in _progress(images, f"{report.name}: images"):
        _check_image(report, image, paths[image["file_name"]], decode=decode)
    return paths


def _check_image(report: Report, image: dict, path: Path, *, decode: bool) -> None:
    name = image["file_name"]
    try:
        size, mode, turn = _header(path, decode=decode)
        if decode or mode.startswith(("I", "F")):  # their range of values must be known
            read_image(path)
    except FileNotFoundError:
        report.add(REFUSED, "missing images", name)
        return
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        report.add(REFUSED, "unreadable images", f"{name} ({one_line(error)})")
        return
    if mode.startswith(("I", "F")):
        what = "images of more than 8 bits: 16 bits are divided by 257, floats multiplied by 255"
        report.add(REPAIRED, what, name)
    stated = (image["width"], image["height"])
    turned = size[::-1] if turn >= 5 else size  # as Detectron2 reads it
    sizes = f"{name} ({stated[0]} x {stated[1]} in the json, {turned[0]} x {turned[1]} as read)"
    if turned == stated:
        if turn != 1:
            what = "images rotated by EXIF when read: their masks must fit the rotated image"
            report.add(REMARK, what, name)
    elif size == stated:
        report.add(REFUSED, "images whose size in the json is that before EXIF rotation", sizes)
    else:
        report.add(REFUSED, "images with another size than in the json", sizes)


def _header(path: Path, *, decode: bool) -> tuple[tuple[int, int], str, int]:
    """Width and height, Pillow's mode, and EXIF orientation of an image file."""
    try:
        with Image.open(path) as file:
            return file.size, file.mode, orientation(file, decode=decode)
    except UnidentifiedImageError:  # what OpenCV reads instead has more than 8 bits
        height, width = read_image(path).shape[:2]
        return (width, height), "F", 1


def _check_annotations(report: Report, coco: CocoFile) -> None:
    """Add remarks on annotations that training uses unchanged."""
    images = {image["id"]: image for image in coco.document["images"]}
    seen: set[str] = set()
    for annotation in _progress(coco.document["annotations"], f"{report.name}: annotations"):
        image, segmentation = images[annotation["image_id"]], annotation.get("segmentation")
        who = f"annotation {annotation['id']} ({image['file_name']})"
        if isinstance(segmentation, list):
            points = np.concatenate([np.asarray(p, dtype=float) for p in segmentation])
            points, sides = points.reshape(-1, 2), (image["width"], image["height"])
            if (points < -_TOLERANCE).any() or (points > np.add(sides, _TOLERANCE)).any():
                report.add(REMARK, "polygons that extend beyond the image", who)
        keys = ("image_id", "category_id", "segmentation" if segmentation else "bbox")
        content = json.dumps([annotation[key] for key in keys])
        if content in seen:
            what = "annotations with image, category and mask of an earlier one"
            report.add(REMARK, what, who)
        seen.add(content)


def _check_polygons_only(report: Report, coco: CocoFile) -> None:
    what = 'masks (RLE) for INPUT.MASK_FORMAT "polygon"; set it to "bitmask"'
    for annotation in coco.document["annotations"]:
        if not annotation["iscrowd"] and isinstance(annotation["segmentation"], dict):
            report.add(REFUSED, what, f"annotation {annotation['id']}")


def _count(report: Report, coco: CocoFile, network_input: NetworkInput) -> None:
    """Count objects per image and per class, and their sizes, originally and at test size."""
    annotations = coco.document["annotations"]
    objects = [a for a in annotations if not a["iscrowd"]]
    report.objects = len(objects)
    report.crowds = len(annotations) - len(objects)
    per_image = Counter(a["image_id"] for a in objects)
    report.most_objects = max(per_image.values(), default=0)
    images, factors = {}, {}
    for image in coco.document["images"]:
        images[image["id"]] = height, width = image["height"], image["width"]
        new_height, new_width = network_input.size(height, width)
        factors[image["id"]] = new_height * new_width / (height * width)
        if not per_image[image["id"]]:
            report.add(REMARK, "images without objects", image["file_name"])
    per_class = Counter(coco.ids[a["category_id"]] for a in objects)
    per_class_image = Counter(
        c for c, _ in {(coco.ids[a["category_id"]], a["image_id"]) for a in objects}
    )
    report.classes = {n: (per_class[i], per_class_image[i]) for i, n in enumerate(coco.classes)}
    for i, name in enumerate(coco.classes):
        if not per_class[i]:
            report.add(REMARK, "classes without objects", name)
    areas = torch.tensor([_area(a, *images[a["image_id"]]) for a in objects])
    resized = areas * torch.tensor([factors[a["image_id"]] for a in objects])
    report.sizes = {"original": size_row(areas), "at test size": size_row(resized)}


def _area(annotation: dict, height: int, width: int) -> float:
    segmentation = annotation.get("segmentation")
    if not segmentation:
        return float(annotation["area"])
    return float(mask_util.area(to_rle(segmentation, height, width)))


def _count_cells(
    report: Report,
    coco: CocoFile,
    grids: Grids,
    network_input: NetworkInput,
    features: list[str],
) -> Cells:
    seen = []
    for record in _progress(to_records(coco, ""), f"{report.name}: cells"):
        try:
            seen.append(network_input.objects(record))
        except ValueError as error:
            offender = f"{record['file_name']} ({one_line(error)})"
            report.add(REFUSED, "images that cannot be resized with their masks", offender)
    now = occupancy(seen, grids)
    scales = torch.cat([torch.zeros(0), *(grids.scales(x.boxes)[x.areas > 0] for x in seen)])
    return Cells(
        features,
        grids,
        now,
        below=int((scales < min(low for low, _ in grids.scale_ranges)).sum()),
        above=int((scales > max(high for _, high in grids.scale_ranges)).sum()),
        scales=quantiles(scales),
        advice=advise(seen, grids, now),
    )


def _check_overlap(train: Report, test: Report, paths: dict[str, dict[str, Path]]) -> None:
    if train is test:
        test.add(REMARK, "data sets that are trained on and evaluated on", test.name)
        return
    for name, path in paths[test.name].items():
        # equal names such as 000001.jpg are no proof by themselves
        if name in paths[train.name] and _same_content(path, paths[train.name][name]):
            test.add(REMARK, f"images that are in {train.name} too, by name and content", name)


def _same_content(path: Path, other: Path) -> bool:
    try:
        return filecmp.cmp(path, other, shallow=False)
    except OSError:  # missing images are reported as such
        return False


def _progress(items: Iterable[dict], description: str) -> Iterable[dict]:
    return tqdm(items, desc=description, leave=False, disable=None)  # on terminals only


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code (see ``--help``)."""
    # Detectron2 makes tensors of Pillow's images without a copy, as in training
    warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
    options = parse(_parser(), arguments)
    try:
        if options.json and not Path(options.json).parent.is_dir():
            raise UserError(f"--json: there is no folder {Path(options.json).parent}")
        cfg = load_config(options.config_file, data=options.data or (), opts=options.opts)
        reports = check(cfg, decode_images=options.images)
        if options.json:
            content = {"summary": summary(reports), "data_sets": to_json(reports)}
            with atomic_write(options.json) as file:
                file.write(json.dumps(content, indent=1).encode())
    except Exception as error:
        print_error(error, options)
        return EXIT_USAGE
    for report in reports:
        print(to_text(report, cfg))
    print(summary(reports))
    return EXIT_PROBLEMS if has_problems(reports) else EXIT_CLEAN


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="solo-d2 check",
        usage="%(prog)s --config-file FILE [options] [KEY VALUE ...]",
        description="Check the data sets of a config before training.",
        epilog="Exit code: 0 only repairs and remarks, 1 training would refuse or skip something, "
        "2 the check could not be made.",
    )
    parser.add_argument("--config-file", required=True, metavar="FILE")
    parser.add_argument(
        "--data",
        nargs=4,
        metavar=("TRAIN_JSON", "TRAIN_IMAGES", "VAL_JSON", "VAL_IMAGES"),
        help="your own data: COCO json files and image folders (DATASETS.CUSTOM in the config)",
    )
    parser.add_argument(
        "--images",
        action="store_true",
        help="decode all images, which finds truncated ones; else only their headers are read",
    )
    parser.add_argument("--json", metavar="FILE", help="also write everything, and every offender")
    return parser


if __name__ == "__main__":
    sys.exit(main())
