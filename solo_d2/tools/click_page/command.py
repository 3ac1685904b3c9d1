"""The command ``click-page``."""

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from solo_d2.arguments import add_model_arguments, load_predictor, parse, print_error
from solo_d2.errors import UserError

from .annotations import AnnotationFile
from .segmenter import Segmenter


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 0, or 2 after an error of one line."""
    options = parse(_parser(), arguments)
    try:
        if importlib.util.find_spec("werkzeug") is None:
            raise UserError("the page needs Werkzeug; run: python -m pip install werkzeug")
        from .server import App, start_server

        folder = Path(options.images)
        if not folder.is_dir():
            raise UserError(f"--images: no folder {folder}")
        predictor = load_predictor(options)
        classes = dict(zip(predictor.names, predictor.category_ids))
        for name in options.classes:
            classes.setdefault(name, max(classes.values()) + 1)
        file = Path(options.output or folder / "annotations.json")
        annotations = AnnotationFile(file, folder, classes)
        app = App(folder, Segmenter(predictor), annotations)
        if not app.images:
            raise UserError(f"no image in {folder} (links are not followed)")
        server = start_server(app, options.port)
    except Exception as error:
        print_error(error, options)
        return 2
    print(f"{len(app.images)} images, annotations in {file}")
    if annotations.skipped:
        print(f"not shown: {annotations.skipped}")
    print(f"http://{server.host}:{server.port}/ (Ctrl-C stops)", flush=True)
    server.serve_forever()  # until Ctrl-C
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="solo-d2 click-page",
        usage="%(prog)s --weights FILE --images FOLDER [options] [KEY VALUE ...]",
        description="Annotate images on a local page: click on an object, and AdaptIS finds it. "
        "Only this machine reaches the page.",
    )
    add_model_arguments(
        parser,
        config_required=False,
        weights_help="output folder of an AdaptIS training, or checkpoint; with --config-file, "
        "the default is MODEL.WEIGHTS",
    )
    parser.add_argument("--images", required=True, metavar="FOLDER")
    parser.add_argument(
        "--output",
        default="",
        metavar="JSON",
        help="COCO annotations to write or to continue (default: annotations.json in FOLDER)",
    )
    parser.add_argument(
        "--classes", nargs="+", default=[], metavar="NAME", help="classes besides the model's"
    )
    parser.add_argument("--port", type=int, default=8765, help="default 8765; 0 for any free one")
    return parser


if __name__ == "__main__":
    sys.exit(main())
