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

import numpy as np
import pycocotools.mask as mask_util
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.transforms import ResizeShortestEdge
from tqdm import tqdm

from solo_d2.arguments import parse, print_error
from solo_d2.config import load_config
from solo_d2.data.annotations import to_rle
from solo_d2.data.catalog import CocoLoader
from solo_d2.data.coco import REFUSED, REPAIRED, CocoFile, read_coco, to_records
from solo_d2.data.images import ImageError, read_header, read_image
from solo_d2.data.setup import class_mismatch, find_custom, register_shapes
from solo_d2.errors import UserError, one_line
from solo_d2.files import atomic_write

from .check_report import REMARK, Report, has_problems, quantiles, size_row, summary, to_text
from .occupancy import Cells

EXIT_CLEAN, EXIT_PROBLEMS, EXIT_USAGE = 0, 1, 2

SOLO_FAMILY = ("SOLO", "DecoupledSOLO", "SOLOv2")

# Pixels by which a polygon may extend beyond the image without a remark.
_TOLERANCE = 2.0


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
    reports = find_sources(cfg)
    has_cells = cfg.MODEL.META_ARCHITECTURE in SOLO_FAMILY
    cells_of = [Cells(cfg) if has_cells else None for _ in reports]
    paths: dict[str, dict[str, Path]] = {}
    classes: dict[str, list[str]] = {}
    for report, cells in zip(reports, cells_of):
        coco = _read(report, masks=cfg.MODEL.MASK_ON)
        if coco is None:
            continue
        classes[f"{report.name!r} ({report.json_file})"] = coco.classes
        paths[report.name] = _check_images(report, coco.document["images"], decode_images)
        polygons_only = cfg.MODEL.MASK_ON and cfg.INPUT.MASK_FORMAT == "polygon"
        _check_annotations(report, coco, refuse_rle=report.is_training and polygons_only)
        _count(report, coco, cfg)
        if cells:
            _count_cells(report, coco, cells)
    if mismatch := class_mismatch(classes):
        reports[-1].add(REFUSED, "data sets with other classes", mismatch)
    training = [report for report in reports if report.is_training]
    if training and not any(report.objects for report in training):
        training[0].add(REFUSED, "training data without objects", training[0].json_file)
    for train in training:
        for test in reports:
            if "DATASETS.TEST" in test.keys and {train.name, test.name} <= paths.keys():
                _check_overlap(train, test, paths)
    return reports


def find_sources(cfg: CfgNode) -> list[Report]:
    """Empty reports on the data sets that ``setup_datasets`` would register; no file is read.

    Raises:
        UserError, FileNotFoundError, ValueError: see ``check``.
    """
    register_shapes(cfg)
    if custom := find_custom(cfg):
        keys = {"TRAIN": "DATASETS.TRAIN", "VAL": "DATASETS.TEST"}
        options = {"crowd_is_object": cfg.DATASETS.CUSTOM.CROWD_IS_OBJECT}
        return [
            Report(found.name, [keys[split]], str(found.json_file), str(found.image_root), options)
            for split, found in custom.items()
        ]
    keys_of: dict[str, list[str]] = {}
    for key in ("DATASETS.TRAIN", "DATASETS.TEST"):
        for name in cfg.DATASETS[key.split(".")[1]]:
            keys_of.setdefault(name, []).append(key)
    if not keys_of:
        raise UserError("the config names no data set in DATASETS.TRAIN, TEST or CUSTOM")
    return [_registered(name, keys) for name, keys in keys_of.items()]


def _registered(name: str, keys: list[str]) -> Report:
    if name not in DatasetCatalog:
        raise UserError(f"{keys[0]}: there is no data set {name!r}")
    loader, metadata = DatasetCatalog.data[name], MetadataCatalog.get(name)
    if isinstance(loader, CocoLoader):  # the original file, not the repaired copy
        json_file, image_root = loader.source()  # draws an embedded data set
        options = loader.options
    else:
        if "json_file" not in metadata.as_dict():
            DatasetCatalog.get(name)
        json_file, image_root, options = metadata.get("json_file"), metadata.get("image_root"), {}
        if not json_file or image_root is None:
            raise UserError(f"{keys[0]}: {name!r} is not a COCO json, the only supported format")
    classes = metadata.get("thing_classes")
    return Report(name, keys, str(json_file), str(image_root), options, classes)


def _read(report: Report, *, masks: bool) -> CocoFile | None:
    """The content that the reader accepts; its findings are added to the report."""
    options = {**report.options, "masks": masks}
    try:
        coco = read_coco(report.json_file, report.image_root, tolerant=True, **options)
    except ValueError as error:
        report.add(REFUSED, "file that is not a COCO json", one_line(error))
        return None
    report.findings.update(coco.findings)
    if report.expected_classes not in (None, coco.classes):
        what = "file with other classes than the registered data set"
        both = {"as registered": report.expected_classes, report.json_file: coco.classes}
        report.add(REFUSED, what, class_mismatch(both))
    return coco


def _check_images(report: Report, images: list[dict], decode: bool) -> dict[str, Path]:
    """Check the image files; returns their paths by file name in the json."""
    report.images, root = len(images), Path(report.image_root)
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
    name, stated = image["file_name"], (image["width"], image["height"])
    try:
        size, turn, is_deep = read_header(path)
        if decode or is_deep:  # its range of values must be known
            size = read_image(path).shape[1::-1]
    except FileNotFoundError:
        report.add(REFUSED, "missing images", name)
        return
    except ImageError as error:
        report.add(REFUSED, "unreadable images", f"{name} ({one_line(error)})")
        return
    if is_deep:
        what = "images of more than 8 bits: 16 bits are divided by 257, floats multiplied by 255"
        report.add(REPAIRED, what, name)
    if size != stated:
        what = "images with another size than in the json"
        if turn >= 5 and size[::-1] == stated:
            what = "images whose size in the json is that before EXIF rotation"
        sizes = f"{stated[0]} x {stated[1]} in the json, {size[0]} x {size[1]} as read"
        report.add(REFUSED, what, f"{name} ({sizes})")
    elif turn != 1:
        what = "images rotated by EXIF when read: their masks must fit the rotated image"
        report.add(REMARK, what, name)


def _check_annotations(report: Report, coco: CocoFile, *, refuse_rle: bool) -> None:
    """Look for problems of annotations that the reader does not change."""
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
        elif refuse_rle and not annotation["iscrowd"]:
            what = 'masks (RLE) for INPUT.MASK_FORMAT "polygon"; set it to "bitmask"'
            report.add(REFUSED, what, who)
        keys = ("image_id", "category_id", "segmentation" if segmentation else "bbox")
        content = json.dumps([annotation[key] for key in keys])
        if content in seen:
            report.add(REMARK, "annotations with image, category and mask of an earlier one", who)
        seen.add(content)


def _count(report: Report, coco: CocoFile, cfg: CfgNode) -> None:
    """Count objects per image and per class, and their sizes, originally and at test size."""
    annotations = coco.document["annotations"]
    objects = [a for a in annotations if not a["iscrowd"]]
    report.objects, report.crowds = len(objects), len(annotations) - len(objects)
    per_image = Counter(a["image_id"] for a in objects)
    report.most_objects = max(per_image.values(), default=0)
    shapes, factors = {}, {}
    low, high = cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST
    for image in coco.document["images"]:
        shapes[image["id"]] = height, width = image["height"], image["width"]
        size = (height, width)
        if low:
            size = ResizeShortestEdge.get_output_shape(height, width, low, high)
        factors[image["id"]] = size[0] * size[1] / (height * width)
        if not per_image[image["id"]]:
            report.add(REMARK, "images without objects", image["file_name"])
    per_class = Counter(coco.ids[a["category_id"]] for a in objects)
    images_of = Counter(
        coco.ids[c] for c, _ in {(a["category_id"], a["image_id"]) for a in objects}
    )
    report.classes = {n: (per_class[i], images_of[i]) for i, n in enumerate(coco.classes)}
    for name, (count, _) in report.classes.items():
        if not count:
            report.add(REMARK, "classes without objects", name)
    areas = torch.tensor([_area(a, *shapes[a["image_id"]]) for a in objects])
    scale = torch.tensor([factors[a["image_id"]] for a in objects])
    report.sizes = {"masks": size_row(areas), "masks at test size": size_row(areas * scale)}


def _area(annotation: dict, height: int, width: int) -> float:
    segmentation = annotation.get("segmentation")
    if not segmentation:
        return float(annotation["area"])
    return float(mask_util.area(to_rle(segmentation, height, width)))


def _count_cells(report: Report, coco: CocoFile, cells: Cells) -> None:
    for record in _progress(to_records(coco, ""), f"{report.name}: cells"):
        try:
            cells.add(cells.see(record))
        except ValueError as error:
            what = "images that cannot be resized with their masks"
            report.add(REFUSED, what, f"{record['file_name']} ({one_line(error)})")
    report.cells = cells
    if cells.objects:
        report.sizes["boxes at test size"] = quantiles(torch.cat(cells.scales))


def _check_overlap(train: Report, test: Report, paths: dict[str, dict[str, Path]]) -> None:
    if train is test:
        test.add(REMARK, "data sets that are trained on and evaluated on", test.name)
        return
    what = f"images that are in {train.name} too, by name and content"
    for name in paths[test.name]:
        # equal names such as 000001.jpg are no proof; missing images are reported as such
        a, b = (paths[report.name].get(name, Path()) for report in (train, test))
        if a.is_file() and b.is_file() and filecmp.cmp(a, b, shallow=False):
            test.add(REMARK, what, name)


def _progress(items: Sequence[dict], description: str) -> Iterable[dict]:
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
            content = {"summary": summary(reports), "data_sets": [r.to_json() for r in reports]}
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
    add = parser.add_argument
    add("--config-file", required=True, metavar="FILE")
    add("--data", nargs=4, metavar=("TRAIN_JSON", "TRAIN_IMAGES", "VAL_JSON", "VAL_IMAGES"),
        help="your own data: COCO json files and image folders")  # fmt: skip
    add("--images", action="store_true",
        help="decode all images, not only their headers: finds truncated ones")  # fmt: skip
    add("--json", metavar="FILE", help="also write everything, and every offender")
    return parser


if __name__ == "__main__":
    sys.exit(main())
