"""Masks on images and videos: ``python -m solo_d2 predict --help``."""

from __future__ import annotations

import argparse
import glob
import itertools
import json
import math
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.data import transforms as T
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.modeling import build_model
from detectron2.structures import Instances
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import nn
from tqdm import tqdm

from solo_d2.checkpoint.checkpointer import Checkpointer
from solo_d2.checkpoint.load import load_weights_file
from solo_d2.config import load_config
from solo_d2.data import setup_datasets
from solo_d2.data.augmentation import test_resize, to_network_input
from solo_d2.drawing import draw_instances, draw_points
from solo_d2.errors import UserError, one_line
from solo_d2.files import atomic_write
from solo_d2.modeling import AdaptISPredictor
from solo_d2.modeling.num_classes import get_value, num_classes_keys

IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
VIDEO_SUFFIXES = {".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm"}

EXIT_OK, EXIT_SKIPPED, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130


class UnreadableError(Exception):
    """A file that is no image or video, a kind that is not handled, or too small for a point."""


class Source(NamedTuple):
    path: Path
    name: Path  # relative to the input that it was found under


class Categories(NamedTuple):
    """Names and COCO ids of the classes; a name is the class number where nothing is known."""

    names: list[str]
    ids: list[int]


class Predictor:
    """Detectron2's ``DefaultPredictor`` on RGB images, for a model that is already loaded."""

    def __init__(self, model: nn.Module, *, resize: T.Augmentation, input_format: str):
        """
        Args:
            model: in eval mode.
            resize: brings an image to the size that the model is for.
            input_format: "RGB" or "BGR", the channel order that the model takes.
        """
        self.model = model
        self.resize = resize
        self.input_format = input_format

    @torch.no_grad()
    def __call__(self, image_rgb: np.ndarray) -> Instances:
        """(H, W, 3) uint8 to the instances of that image, on the CPU."""
        height, width = image_rgb.shape[:2]
        tensor = to_network_input(image_rgb, self.resize, self.input_format)
        output = self.model([{"image": tensor, "height": height, "width": width}])[0]
        return output["instances"].to("cpu")


class PointsPredictor:
    """What lies under points, the same ones in each image; one instance per point."""

    def __init__(self, predictor: AdaptISPredictor, points: Sequence[tuple[float, float]]):
        """
        Args:
            predictor: asked once per image.
            points: x and y in pixels.
        """
        self.predictor = predictor
        self.points = points

    def __call__(self, image_rgb: np.ndarray) -> Instances:
        """(H, W, 3) uint8 to the instances under the points, on the CPU.

        Raises:
            UnreadableError: a point is outside the image.
        """
        self.predictor.set_image(image_rgb)
        try:
            return self.predictor.predict(self.points)
        except ValueError as error:
            raise UnreadableError(str(error)) from error


class CocoWriter:
    """Collects detections and writes them as COCO results, with the images they belong to."""

    def __init__(self, folder: Path, categories: Categories):
        self.folder = folder
        self.categories = categories
        self.images: list[dict[str, Any]] = []
        self.results: list[dict[str, Any]] = []

    def add(self, file_name: str, instances: Instances) -> None:
        """Image ids count from 1 in the order of the calls."""
        height, width = instances.image_size
        image = {"id": len(self.images) + 1, "file_name": file_name}
        self.images.append({**image, "height": height, "width": width})
        for result in instances_to_coco_json(instances, image["id"]):
            result["category_id"] = self.categories.ids[result["category_id"]]
            self.results.append(result)

    def write(self) -> None:
        """coco_results.json for ``COCO.loadRes``, images.json for ``COCO``; each whole or not."""
        names, ids = self.categories
        categories = [{"id": i, "name": n} for i, n in zip(ids, names, strict=True)]
        dataset = {
            "info": {"description": "images of solo_d2.tools.predict"},
            "images": self.images,
            "annotations": [],
            "categories": categories,
        }
        contents = {"images.json": dataset, "coco_results.json": self.results}
        for name, content in contents.items():
            with atomic_write(self.folder / name) as file:
                file.write(json.dumps(content).encode())


def read_image(path: str | Path) -> np.ndarray:
    """Read any image as Detectron2's loader would, and 16-bit ones too, scaled by 1/256.

    EXIF orientation is applied, an alpha channel is dropped, gray becomes RGB; of an image with
    several frames the first is taken.

    Returns:
        (H, W, 3) uint8, RGB.

    Raises:
        UnreadableError: with the reason.
    """
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith(("I", "F")):  # one channel of more than 8 bits
                return _to_8_bit(np.asarray(image))
            return np.asarray(image.convert("RGB"))
    except UnidentifiedImageError:
        # Pillow has no 16-bit RGB TIFF; OpenCV does.
        array = cv2.imread(str(path), cv2.IMREAD_UNCHANGED | cv2.IMREAD_IGNORE_ORIENTATION)
        if array is None:
            raise UnreadableError("not an image") from None
        if array.ndim == 3:
            array = array[:, :, 2::-1] if array.shape[2] >= 3 else array[:, :, 0]
        return _to_8_bit(array)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UnreadableError(f"cannot be read ({error})") from error


def find_sources(inputs: Sequence[str], exclude: Path) -> list[Source]:
    """The files that files, folders (with subfolders) and glob patterns stand for.

    Args:
        inputs: as given on the command line.
        exclude: the output folder; nothing under it is an input.

    Raises:
        UserError: an input matches nothing.
    """
    sources: dict[Path, Source] = {}
    for text in inputs:
        found = [s for s in _expand(text) if exclude.resolve() not in s.path.resolve().parents]
        if not found:
            raise UserError(f"no image or video matches {text!r}")
        for source in found:
            sources.setdefault(source.path.resolve(), source)
    return list(sources.values())


def output_names(sources: Iterable[Source]) -> list[Path]:
    """A distinct relative path for each source's picture or video."""
    taken: set[str] = set()
    names = []
    for source in sources:
        kept, suffix = ({".mp4"}, ".mp4") if _is_video(source.path) else ({".jpg", ".png"}, ".png")
        # "scan.tiff" becomes "scan.tiff.png", so that it stays apart from "scan.png".
        name = source.name
        name = name if name.suffix.lower() in kept else name.with_name(name.name + suffix)
        number, stem = 1, name.stem
        while str(name).lower() in taken:  # not all file systems tell case apart
            number += 1
            name = name.with_name(f"{stem}_{number}{name.suffix}")
        taken.add(str(name).lower())
        names.append(name)
    return names


def predict_sources(
    predictor: Predictor | PointsPredictor,
    sources: Sequence[Source],
    folder: Path,
    *,
    categories: Categories,
    score_threshold: float,
    write_json: bool,
) -> list[str]:
    """Write a picture or video for each source as it is done, and the json at the end.

    The json is written as well when this is interrupted or fails, with what was done until then.

    Args:
        score_threshold: of the drawn instances; the json has all. What was asked for by points is
            drawn whatever its score, together with the points.

    Returns:
        One line for each source that was skipped.
    """
    writer = CocoWriter(folder, categories)
    metadata = argparse.Namespace(thing_classes=categories.names)
    skipped = []

    def process(image: np.ndarray, file_name: str) -> np.ndarray:
        instances = predictor(image)
        if write_json:
            writer.add(file_name, instances)
        if isinstance(predictor, PointsPredictor):
            drawn = draw_instances(image, instances, metadata, score_threshold=0.0)
            return draw_points(drawn, predictor.points)
        return draw_instances(image, instances, metadata, score_threshold)

    progress = tqdm(list(zip(sources, output_names(sources), strict=True)), unit="file")
    try:
        for source, name in progress:
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                if _is_video(source.path):
                    _predict_video(process, source, target)
                else:
                    drawn = process(read_image(source.path), source.name.as_posix())
                    _write_picture(target, drawn)
            except UnreadableError as error:
                skipped.append(f"{source.path}: {error}")
                progress.write(f"skipped {skipped[-1]}", file=sys.stderr)
    finally:
        if write_json:
            writer.write()
    return skipped


def load_predictor(
    cfg: CfgNode,
    weights: str,
    *,
    points: Sequence[tuple[float, float]] = (),
    allow_pickle: bool = False,
) -> tuple[Predictor | PointsPredictor, Categories]:
    """Build the model of ``cfg`` with the classes that its weights were trained for.

    Class names come from the checkpoint if it has them, else from the data set's metadata.

    Raises:
        UserError: the numbers of classes in config and checkpoint differ, or are unknown.
        ValueError, OSError: the weights cannot be used (the message names the file), or there are
            points for a model that takes none.
    """
    checkpoint = load_weights_file(weights, allow_pickle=allow_pickle)
    trained = (checkpoint.get("solo_d2") or {}).get("thing_classes")
    dataset = _dataset_categories(cfg, needed=trained is None)
    if trained is not None:
        for key in num_classes_keys(cfg):
            configured = get_value(cfg, key)
            if configured not in (-1, len(trained)):
                raise UserError(
                    f"{key} is {configured}, but {weights} was trained for {len(trained)} classes"
                )
            cfg.merge_from_list([key, len(trained)])
        # The data set of the config may be another one, or not be on this machine.
        cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ()
    names = trained or (dataset.names if dataset else None)
    model = build_model(cfg).eval()
    Checkpointer(model, thing_classes=names, allow_pickle=allow_pickle).load(weights)
    predictor: Predictor | PointsPredictor
    if points:
        prompted = AdaptISPredictor(
            model,
            resize=test_resize(cfg),
            input_format=cfg.INPUT.FORMAT,
        )
        predictor = PointsPredictor(prompted, points)
    else:
        predictor = Predictor(model, resize=test_resize(cfg), input_format=cfg.INPUT.FORMAT)
    count = len(names) if names else get_value(cfg, num_classes_keys(cfg)[0])
    # The data set's ids belong to its own classes only.
    ids = dataset.ids if dataset and dataset.names == names else list(range(1, count + 1))
    return predictor, Categories(names or [str(i) for i in range(count)], ids)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code (see ``--help``)."""
    options = _parser().parse_intermixed_args(arguments)
    try:
        points, options.inputs = _split_points(options.points, options.inputs)
        cfg, inputs = _configure(options)
        folder = Path(options.output)
        sources = find_sources(inputs, exclude=folder)
        weights = options.weights or cfg.MODEL.WEIGHTS
        if not weights:
            raise UserError("no weights: give --weights, or MODEL.WEIGHTS in the config")
        predictor, categories = load_predictor(
            cfg, weights, points=points, allow_pickle=options.allow_pickle
        )
        folder.mkdir(parents=True, exist_ok=True)
    except (UserError, OSError, ValueError, KeyError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return EXIT_USAGE
    try:
        skipped = predict_sources(
            predictor,
            sources,
            folder,
            categories=categories,
            score_threshold=options.score_threshold,
            write_json=options.json,
        )
    except KeyboardInterrupt:
        print(f"interrupted; what was done is in {folder}", file=sys.stderr)
        return EXIT_INTERRUPTED
    print(f"{len(sources) - len(skipped)} of {len(sources)} files written to {folder}")
    return EXIT_SKIPPED if skipped else EXIT_OK


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m solo_d2 predict",
        description="Draw the instances of images and videos.",
        epilog="Exit code: 0 all done, 1 some files were skipped, 2 nothing could be started.",
    )
    parser.add_argument("--config-file", required=True, metavar="YAML")
    parser.add_argument("--weights", metavar="PTH", help="default: MODEL.WEIGHTS of the config")
    parser.add_argument("--output", required=True, metavar="DIR")
    parser.add_argument(
        "--json",
        action="store_true",
        help="also write all detections as COCO results: coco_results.json and images.json",
    )
    parser.add_argument(
        "--score-threshold",
        type=float,
        default=0.3,
        metavar="S",
        help="lowest score that is drawn (default 0.3)",
    )
    parser.add_argument(
        "--points",
        nargs="+",
        default=[],
        metavar="X,Y",
        help="draw what lies under these points of each image, in its pixels (AdaptIS only)",
    )
    parser.add_argument(
        "--allow-pickle",
        action="store_true",
        help="load weights that can run code; only for files that you trust",
    )
    parser.add_argument(
        "inputs",
        nargs="*",
        metavar="INPUT",
        help="images, videos, folders (with subfolders), glob patterns; then config overrides as "
        "KEY VALUE pairs",
    )
    return parser


def _split_points(
    words: Sequence[str], inputs: Sequence[str]
) -> tuple[list[tuple[float, float]], list[str]]:
    """(points, inputs): inputs may follow the points of --points, which takes them for points."""
    points = []
    for word in words:
        try:
            x, y = map(float, word.split(","))
        except ValueError:
            break
        if not (math.isfinite(x) and math.isfinite(y)):
            raise UserError(f"--points {word}: not two finite numbers")
        points.append((x, y))
    if words and not points:
        raise UserError(f"--points {words[0]}: not two numbers with a comma between them")
    return points, [*words[len(points) :], *inputs]


def _configure(options: argparse.Namespace) -> tuple[CfgNode, list[str]]:
    """(config, inputs): the first word that is a config key and no file starts the overrides."""
    known = load_config()
    words = options.inputs
    is_key = [w.split(".")[0] in known and not Path(w).exists() for w in words]
    first = is_key.index(True) if True in is_key else len(words)
    inputs, overrides = words[:first], words[first:]
    if not inputs:
        raise UserError("no INPUT before the config overrides")
    if len(overrides) % 2:
        raise UserError(f"config overrides come in pairs KEY VALUE: {' '.join(overrides)}")
    return load_config(options.config_file, opts=overrides), inputs


def _dataset_categories(cfg: CfgNode, *, needed: bool) -> Categories | None:
    """Names and ids from the metadata of the config's data set; None where it is not known."""
    try:
        setup_datasets(cfg)
    except (OSError, ValueError, UserError):
        # Without its json, a user's own data set has no names; the checkpoint may have them.
        if needed:
            raise
        return None
    for dataset in (*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN):
        metadata = MetadataCatalog.get(dataset)
        names = metadata.get("thing_classes")
        if names is not None:
            to_contiguous = metadata.get("thing_dataset_id_to_contiguous_id") or {
                i + 1: i for i in range(len(names))
            }
            ids = sorted(to_contiguous, key=to_contiguous.__getitem__)
            return Categories(list(names), ids)
    return None


def _expand(text: str) -> Iterator[Source]:
    path = Path(text)
    if path.is_dir():
        for file in sorted(path.rglob("*")):
            if file.suffix.lower() in IMAGE_SUFFIXES | VIDEO_SUFFIXES and file.is_file():
                yield Source(file, file.relative_to(path))
    elif path.exists():  # a file that is named is tried, whatever its suffix
        yield Source(path, Path(path.name))
    else:
        for match in sorted(glob.glob(text, recursive=True)):
            if Path(match).is_file():
                yield Source(Path(match), Path(Path(match).name))


def _is_video(path: Path) -> bool:
    return path.suffix.lower() in VIDEO_SUFFIXES


def _predict_video(process: Any, source: Source, target: Path) -> None:
    capture = cv2.VideoCapture(str(source.path))
    video = None
    try:
        frames = int(max(0, capture.get(cv2.CAP_PROP_FRAME_COUNT)))
        rate = capture.get(cv2.CAP_PROP_FPS) or 25.0
        for number in tqdm(itertools.count(), total=frames or None, unit="frame", leave=False):
            found, frame = capture.read()
            if not found:
                break
            drawn = process(frame[:, :, ::-1], f"{source.name.as_posix()}#{number}")
            if video is None:
                size = (drawn.shape[1], drawn.shape[0])
                video = cv2.VideoWriter(str(target), cv2.VideoWriter_fourcc(*"mp4v"), rate, size)
                if not video.isOpened():
                    raise UnreadableError(f"OpenCV cannot write a video of size {size}")
            video.write(np.ascontiguousarray(drawn[:, :, ::-1]))
    finally:
        capture.release()
        if video is not None:
            video.release()
    if video is None:
        raise UnreadableError("not a video, or one without frames")


def _to_8_bit(array: np.ndarray) -> np.ndarray:
    """(H, W) or (H, W, 3) of 8 or 16 bits to (H, W, 3) uint8."""
    if array.dtype.kind not in "ui" or array.min() < 0 or array.max() > 65535:
        raise UnreadableError(f"pixels of type {array.dtype} are not handled, only 8 and 16 bits")
    if array.dtype != np.uint8:
        array = (array // 256).astype(np.uint8)
    return np.ascontiguousarray(np.dstack([array] * 3) if array.ndim == 2 else array)


def _write_picture(path: Path, image_rgb: np.ndarray) -> None:
    image_format = "JPEG" if path.suffix.lower() == ".jpg" else "PNG"
    with atomic_write(path) as file:
        Image.fromarray(image_rgb).save(file, format=image_format, quality=92)


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    # So that a job that is stopped writes its json too.
    signal.signal(signal.SIGTERM, _interrupt)
    sys.exit(main())
