"""Export a model to ONNX or torch.export: ``python -m solo_d2 export --help``."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from solo_d2.arguments import add_model_arguments, load_predictor, parse
from solo_d2.data.scenes import draw_scene
from solo_d2.errors import UserError, is_user_error, one_line
from solo_d2.export.check import compare, raw_instances
from solo_d2.export.files import FORMATS, build_graph, describe, export, round_weights
from solo_d2.images import as_rgb
from solo_d2.predictor import Predictor, load_exported

EXIT_OK, EXIT_DIFFERS, EXIT_USAGE = 0, 1, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code (see ``--help``)."""
    options = parse(_parser(), arguments)
    try:
        return _run(options)
    except Exception as error:
        if not is_user_error(error):
            raise
        print(f"error: {one_line(error)}", file=sys.stderr)
        return EXIT_USAGE


def _run(options: argparse.Namespace) -> int:
    path, size = Path(options.output), _size(options.size)
    suffix = FORMATS[options.format]
    if path.suffix != suffix:
        raise UserError(f"--output {path}: the name of format {options.format} ends in {suffix}")
    if options.half and options.format != "onnx":
        raise UserError("--half is for --format onnx")
    predictor = load_predictor(options, opts=["MODEL.DEVICE", "cpu", *options.opts])
    graph = build_graph(predictor.model)
    image = as_rgb(options.image) if options.image else _drawn()
    if options.half:
        round_weights(predictor.model)
    metadata = describe(
        graph,
        class_names=predictor.names,
        category_ids=predictor.category_ids,
        channel_order=predictor.input_format,
        resize=predictor.resize,
        size=size,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    for file in export(graph, metadata, path, format=options.format, half=options.half):
        print(f"{file}: {file.stat().st_size / 1e6:.1f} MB")
    return _check(predictor, path, image, options.image or "a drawn image")


def _check(predictor: Predictor, path: Path, image: np.ndarray, name: str) -> int:
    other = load_exported(path, allow_pickle=True)  # written a moment ago
    exported: Any = other.model
    network_input = other.network_input(image)
    if exported.metadata.size:  # the eager model sees the padding as a part of the image
        network_input = exported.pad(network_input)[0]
    eager = predictor.model
    found = compare(
        raw_instances(eager, network_input),
        raw_instances(exported, network_input),
        mask_threshold=exported.metadata.options.get("mask_threshold", 0.5),
        in_order=predictor.takes_points,
    )
    height, width = network_input.shape[-2:]
    print(f"{name} at {height} x {width}, eager and exported, with the worst differences:")
    print(found.table())
    if not found.eager:
        print("nothing was found in this image; name one with objects: --image FILE")
    if not found.equal:
        print("error: the file's results differ by more than float noise", file=sys.stderr)
    return EXIT_OK if found.equal else EXIT_DIFFERS


def _drawn() -> np.ndarray:
    return draw_scene(np.random.default_rng(0), 480, 640)[0]


def _size(words: Sequence[str]) -> tuple[int, int] | None:
    """
    Raises:
        UserError: neither "dynamic" nor two positive numbers.
    """
    if list(words) == ["dynamic"]:
        return None
    if len(words) != 2 or not all(word.isdecimal() and int(word) > 0 for word in words):
        raise UserError(f"--size {' '.join(words)}: neither H W in pixels nor 'dynamic'")
    return int(words[0]), int(words[1])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="solo-d2 export",
        usage="%(prog)s --weights FILE --output model.onnx [options] [KEY VALUE ...]",
        description="Write a model as a file that predicts without its config and checkpoint, then "
        "run it on one image and compare it with the model.",
        epilog="KEY VALUE pairs override the config. Exit code: 0 done and equal up to float "
        "noise, 1 the results differ, 2 nothing was exported.",
    )
    add_model_arguments(
        parser,
        config_required=False,
        weights_help="output folder of a training, or checkpoint; with --config-file by default "
        "MODEL.WEIGHTS",
    )
    parser.add_argument("--output", required=True, metavar="FILE", help="ends in .onnx or .pt2")
    parser.add_argument(
        "--format",
        choices=tuple(FORMATS),
        default="onnx",
        help="onnx (default), or torch: a .pt2 file of torch.export",
    )
    parser.add_argument(
        "--size",
        nargs="+",
        default=["dynamic"],
        metavar=("H", "W"),
        help="height and width of the only input that the file takes, rounded up to what the model "
        "needs; images are resized to fit. Default: dynamic, any size",
    )
    parser.add_argument(
        "--half",
        action="store_true",
        help="round weights to float16 and store them so: half the size. Computation stays float32",
    )
    parser.add_argument("--image", default="", metavar="FILE", help="to compare on; default: drawn")
    return parser


if __name__ == "__main__":
    sys.exit(main())
