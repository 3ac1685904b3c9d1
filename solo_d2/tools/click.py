"""Measuring how well one click finds each object: ``solo-d2 click --help``."""

import argparse
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
from detectron2.data import DatasetCatalog
from detectron2.data.detection_utils import annotations_to_instances

from solo_d2.arguments import add_model_arguments, parse, print_error
from solo_d2.config import load_config
from solo_d2.data import setup_datasets
from solo_d2.data.images import read_image
from solo_d2.errors import UserError
from solo_d2.predictor import Predictor, load


class Clicks(NamedTuple):
    """The result for one image."""

    ious: np.ndarray  # (N,) per object
    image_seconds: float  # for everything that does not depend on points
    click_seconds: float  # for all N points


def most_interior_pixel(mask: np.ndarray) -> tuple[int, int]:
    """x and y of the pixel of a mask (H, W), not empty, that is farthest from the mask's border."""
    padded = np.pad(mask.astype(np.uint8), 1)
    distance = cv2.distanceTransform(padded, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    y, x = np.unravel_index(distance.argmax(), distance.shape)
    return int(x) - 1, int(y) - 1


def click(predictor: Predictor, record: dict[str, Any]) -> Clicks | None:
    """Click into the middle of each object of an image; None where it has none.

    Args:
        predictor: predictor of a model that accepts points.
        record: in Detectron2's format, with annotations. Crowds are left out.
    """
    objects = [a for a in record["annotations"] if not a.get("iscrowd", 0)]
    size = record["height"], record["width"]
    if not objects:
        return None
    masks = annotations_to_instances(objects, size, mask_format="bitmask").gt_masks.tensor.numpy()
    masks = masks[masks.any(axis=(1, 2))]
    points = [most_interior_pixel(mask) for mask in masks]
    if not points:
        return None
    image = read_image(record["file_name"])
    start = time.perf_counter()
    predictor.set_image(image)
    ready = time.perf_counter()
    found = predictor.click(points).instances.pred_masks.numpy()
    end = time.perf_counter()
    both = (found & masks).sum(axis=(1, 2))
    either = (found | masks).sum(axis=(1, 2))
    return Clicks(both / either, ready - start, end - ready)


def summary(clicks: Iterable[Clicks]) -> str:
    """Two lines about all images."""
    clicks = list(clicks)
    ious = np.concatenate([x.ious for x in clicks])
    per_image = 1000 * np.mean([x.image_seconds for x in clicks])
    per_click = 1000 * sum(x.click_seconds for x in clicks) / len(ious)
    good = ", ".join(f"{(ious >= t).mean():.1%} at least {t}" for t in (0.5, 0.75, 0.85))
    return (
        f"{len(ious)} objects in {len(clicks)} images: mean IoU {ious.mean():.4f}; {good}\n"
        f"{per_image:.1f} ms per image, then {per_click:.1f} ms per click"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 0, or 2 after an error of one line."""
    options = parse(_parser(), arguments)
    try:
        cfg = load_config(options.config_file, opts=options.opts)
        setup_datasets(cfg)
        predictor = load(cfg, weights=options.weights, allow_pickle=options.allow_pickle)
        records = [r for name in cfg.DATASETS.TEST for r in DatasetCatalog.get(name)]
        clicks = list(filter(None, (click(predictor, record) for record in records)))
        if not clicks:
            raise UserError(f"no objects in DATASETS.TEST {cfg.DATASETS.TEST}")
    except Exception as error:
        print_error(error, options)
        return 2
    print(summary(clicks))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="solo-d2 click",
        usage="%(prog)s --config-file YAML [options] [KEY VALUE ...]",
        description="Click once into the middle of each object of DATASETS.TEST, and compare the "
        "object with what a model that takes points (AdaptIS) finds there.",
    )
    add_model_arguments(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
