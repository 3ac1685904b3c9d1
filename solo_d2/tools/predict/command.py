"""The command ``predict``."""

import argparse
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from solo_d2.arguments import (
    add_dtype_argument,
    add_model_arguments,
    load_predictor,
    parse,
    print_error,
)
from solo_d2.errors import UserError, one_line
from solo_d2.images import UnreadableError
from solo_d2.predictor import Result

from . import outputs as formats
from .inputs import Source, Video, find_sources, output_names
from .prototypes import Prototypes

Predict = Callable[[str | np.ndarray], Result]

EXIT_OK, EXIT_SKIPPED, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130
FORMATS = ("pictures", "coco", "coco-results", "masks", "label-maps")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code (see ``--help``)."""
    options = parse(_parser(), arguments)
    Image.MAX_IMAGE_PIXELS = None  # Pillow's limit; --max-megapixels takes its place
    folder = Path(options.output)
    try:
        points, inputs = _split_points(options.points, options.inputs)
        if not inputs:
            raise UserError("no INPUT: name images, videos or folders")
        sources = find_sources(inputs, exclude=folder)
        outputs = _outputs(options, folder, sources)
        predictor = load_predictor(options, dtype=options.dtype)
        predictor.max_pixels = round(options.max_megapixels * 1e6)
        if points and not predictor.takes_points:
            raise UserError(f"--points needs AdaptIS, not {type(predictor.model).__name__}")
        if options.prototypes:
            outputs.append(Prototypes(folder, options.score, predictor))
        folder.mkdir(parents=True, exist_ok=True)
    except Exception as error:
        print_error(error, options)
        return EXIT_USAGE

    def predict(image: str | np.ndarray) -> Result:
        if not points:
            return predictor.predict(image)
        predictor.set_image(image)
        try:
            return predictor.click(points)
        except ValueError as error:  # a point is outside the image
            raise UnreadableError(str(error)) from error

    try:
        with _stop_signal_interrupts():
            skipped = predict_sources(predict, sources, outputs)
    except UserError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return EXIT_USAGE
    except KeyboardInterrupt:
        print(f"interrupted; results so far are in {folder}", file=sys.stderr)
        return EXIT_INTERRUPTED
    print(f"{len(sources) - len(skipped)} of {len(sources)} files: results are in {folder}")
    return EXIT_SKIPPED if skipped else EXIT_OK


def predict_sources(
    predict: Predict, sources: Sequence[Source], outputs: Sequence[formats.Output]
) -> list[str]:
    """Pass the results of each source to each output.

    The outputs are also closed if this is interrupted or fails, so results so far are kept.

    Args:
        predict: (path or array) -> ``Result``.
        sources: result of ``inputs.find_sources``.
        outputs: instances of the classes in ``outputs``.

    Returns:
        One line for each source that was skipped.
    """
    skipped = []
    # disable=None: no progress bar outside of terminals
    progress = tqdm(list(zip(sources, output_names(sources))), unit="file", disable=None)
    try:
        for source, target in progress:
            try:
                if source.is_video:
                    _predict_video(predict, source, target, outputs)
                else:
                    result = predict(source.location)
                    for output in outputs:
                        output.add(source, target, result)
            except UnreadableError as error:
                skipped.append(f"{source.location}: {error}")
                progress.write(f"skipped {skipped[-1]}", file=sys.stderr)
    finally:
        for output in outputs:
            output.close()
    return skipped


def _predict_video(
    predict: Predict, source: Source, target: Path, outputs: Sequence[formats.Output]
) -> None:
    video = Video(source)
    number = -1
    try:
        frames = tqdm(video, total=video.length, unit="frame", leave=False, disable=None)
        for number, image in enumerate(frames):
            result = predict(image)
            for output in outputs:
                if number == 0:
                    output.start_video(target, video.rate)
                output.add_frame(source, number, result)
    finally:
        for output in outputs:
            output.end_video()
    if number < 0:
        raise UnreadableError("not a video, or one without frames")


def _outputs(
    options: argparse.Namespace, folder: Path, sources: Sequence[Source]
) -> list[formats.Output]:
    score = options.score
    videos = [source for source in sources if source.is_video]
    chosen = dict.fromkeys(options.format or ["pictures"])
    if videos and "pictures" in chosen:
        formats.check_video_writer()
    if videos and "coco" in chosen:
        raise UserError(f"--format coco takes images only, not {videos[0].location}")
    folders = [os.path.dirname(os.path.realpath(source.location)) for source in sources]
    style = {"color_by": options.color_by, "labels": not options.no_labels}
    make: dict[str, Callable[[], formats.Output]] = {
        "pictures": lambda: formats.Pictures(folder, score, **style),
        "coco": lambda: formats.CocoDataset(folder, score, Path(os.path.commonpath(folders))),
        "coco-results": lambda: formats.CocoResults(folder, score),
        "masks": lambda: formats.IdMasks(folder, score),
        "label-maps": lambda: formats.LabelMaps(folder, score),
    }
    return [make[name]() for name in chosen]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="solo-d2 predict",
        usage="%(prog)s --weights FILE [options] INPUT ... [KEY VALUE ...]",
        description="Segment images and videos.",
        epilog="KEY VALUE pairs override the config. Exit code: 0 all done, 1 some inputs were "
        "skipped, 2 nothing could be started, 130 interrupted.",
    )
    add_model_arguments(
        parser,
        config_required=False,
        weights_help="output folder of a training run, or checkpoint; with --config-file, the "
        "default is MODEL.WEIGHTS",
    )
    parser.add_argument("--output", default="output/predictions", metavar="DIR")
    add_dtype_argument(parser)
    parser.add_argument(
        "--format",
        action="append",
        choices=FORMATS,
        help="may be repeated. pictures: images and videos with masks drawn on them (default); "
        "coco: annotations.json, a data set; coco-results: all instances, of any score; masks: a "
        "PNG per image with the numbers of its instances; label-maps: a PNG with the class of each "
        "pixel (EPS)",
    )
    parser.add_argument(
        "--score",
        "--score-threshold",
        type=float,
        default=0.3,
        metavar="S",
        help="leave out instances with a lower score (default 0.3)",
    )
    parser.add_argument("--no-labels", action="store_true", help="draw no class names and scores")
    parser.add_argument("--color-by", choices=("instance", "class"), default="instance")
    parser.add_argument(
        "--points",
        nargs="+",
        default=[],
        metavar="X,Y",
        help="find the objects under these points of each image, in pixels (AdaptIS only)",
    )
    parser.add_argument(
        "--prototypes",
        action="store_true",
        help="also draw the prototypes of each image as a grid (YOLACT only)",
    )
    parser.add_argument(
        "--max-megapixels",
        type=float,
        default=64.0,
        metavar="N",
        help="refuse larger images (default 64; 0 for no limit): masks have the image's size",
    )
    parser.add_argument(
        "inputs",
        nargs="*",
        metavar="INPUT",
        help="image, video, folder (with subfolders), glob pattern, number of a webcam, or URL of "
        "a video",
    )
    return parser


def _split_points(
    words: Sequence[str], inputs: Sequence[str]
) -> tuple[list[tuple[float, float]], list[str]]:
    """(points, inputs): argparse takes inputs that follow the points of --points for points."""
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
        raise UserError(f"--points {words[0]}: not two numbers separated by a comma")
    return points, [*words[len(points) :], *inputs]


@contextmanager
def _stop_signal_interrupts() -> Iterator[None]:
    """Within the block, SIGTERM acts like Ctrl-C, so that a stopped job still writes its json."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
