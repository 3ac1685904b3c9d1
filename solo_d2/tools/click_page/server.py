"""The page's server: what it answers, and to whom."""

import json
import mimetypes
import socket
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import cv2
from werkzeug.exceptions import Forbidden, HTTPException, NotFound, UnprocessableEntity
from werkzeug.serving import BaseWSGIServer, WSGIRequestHandler, make_server
from werkzeug.wrappers import Request, Response

from solo_d2.drawing import instance_color
from solo_d2.errors import is_user_error, one_line
from solo_d2.images import as_rgb
from solo_d2.tools.predict.inputs import IMAGE_SUFFIXES

from .annotations import AnnotationFile
from .segmenter import Segmenter

ADDRESS = "127.0.0.1"
_STATIC = Path(__file__).with_name("static")
_NUM_COLORS = 36  # the palette in three shades

# Nothing is loaded from elsewhere, and no other page can embed or read this one.
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


class _LocalRequest(Request):
    # Another name that leads here is DNS rebinding: a page of that name could read everything.
    trusted_hosts = [ADDRESS, "localhost"]
    max_content_length = 64 * 1024**2


class App:
    """The WSGI application."""

    def __init__(self, folder: Path, segmenter: Segmenter, annotations: AnnotationFile):
        """
        Args:
            folder: the images, also in its subfolders; no other file can be read.
            segmenter: finds the objects.
            annotations: keeps them.
        """
        self._folder = folder.resolve()
        self._segmenter = segmenter
        self._annotations = annotations
        self.images = self._find_images()
        self._routes: dict[tuple[str, str], Callable[[Request], Response]] = {
            ("GET", "/"): lambda _: _static("page.html"),
            ("GET", "/page.css"): lambda _: _static("page.css"),
            ("GET", "/page.js"): lambda _: _static("page.js"),
            ("GET", "/state"): self._state,
            ("GET", "/pixels"): self._pixels,
            ("GET", "/objects"): self._objects,
            ("POST", "/click"): self._click,
            ("POST", "/automatic"): self._automatic,
            ("POST", "/save"): self._save,
        }

    def __call__(self, environ: Any, start_response: Any) -> Iterable[bytes]:
        request = _LocalRequest(environ)
        try:
            response = self._answer(request)
        except HTTPException as error:
            response = _json({"error": error.description}, error.code or 500)
        response.headers.update(_HEADERS)
        return response(environ, start_response)

    def _answer(self, request: Request) -> Response:
        origin = request.host_url.rstrip("/")  # raises SecurityError (400) for another host
        if request.method == "POST":
            if request.headers.get("Origin") != origin or not request.is_json:
                raise Forbidden("Only this page may change something.")
        # A link from another site to the page itself does no harm.
        elif request.path != "/" and "site" in request.headers.get("Sec-Fetch-Site", ""):
            raise Forbidden("Only this page may read this.")
        route = self._routes.get((request.method, request.path))
        if route is None:
            raise NotFound()
        try:
            return route(request)
        except Exception as error:
            if not is_user_error(error):
                raise
            raise UnprocessableEntity(one_line(error)) from error

    def _find_images(self) -> dict[str, Path]:
        """Name relative to the folder -> path. Links are left out: they may lead elsewhere."""
        paths = (p for p in sorted(self._folder.rglob("*")) if p.suffix.lower() in IMAGE_SUFFIXES)
        return {
            path.relative_to(self._folder).as_posix(): path
            for path in paths
            if path.is_file() and path.resolve() == path
        }

    def _path(self, name: str) -> Path:
        path = self.images.get(name)
        if path is None or path.resolve() != path:  # replaced by a link since
            raise NotFound("There is no such image.")
        return path

    def _state(self, request: Request) -> Response:
        self.images = self._find_images()
        return _json(
            {
                "images": list(self.images),
                "counts": self._annotations.counts(),
                "classes": self._annotations.classes,
                "file": str(self._annotations.path),
                "colors": [instance_color(i) for i in range(_NUM_COLORS)],
            }
        )

    def _pixels(self, request: Request) -> Response:
        # What the model sees: upright and in 8 bits, also of a file that browsers cannot show.
        image = as_rgb(self._path(request.args.get("image", "")))
        _, encoded = cv2.imencode(".jpg", image[:, :, ::-1])
        return Response(encoded.tobytes(), mimetype="image/jpeg")

    def _objects(self, request: Request) -> Response:
        name = request.args.get("image", "")
        size = self._segmenter.embed(self._path(name))
        found = self._annotations.objects(name, size)
        return _json({"height": size[0], "width": size[1], "objects": found})

    def _click(self, request: Request) -> Response:
        content = request.get_json()
        found = self._segmenter.click(
            self._path(content["image"]),
            content["points"],
            content["labels"],
            known=content["known"],
            base=content["base"],
        )
        return _json({"objects": [found] if found else []})

    def _automatic(self, request: Request) -> Response:
        content = request.get_json()
        found = self._segmenter.find_all(self._path(content["image"]), content["known"])
        return _json({"objects": found})

    def _save(self, request: Request) -> Response:
        content = request.get_json()
        size = self._segmenter.embed(self._path(content["image"]))
        self._annotations.save(content["image"], size, content["objects"])
        return _json({})


def start_server(app: App, port: int) -> BaseWSGIServer:
    """A server that only this machine reaches; ``serve_forever`` runs it.

    Raises:
        OSError: the port is taken.
    """
    with socket.create_server((ADDRESS, port)) as bound:  # Werkzeug would exit on an error
        return make_server(
            ADDRESS, port, app, threaded=True, request_handler=_QuietHandler, fd=bound.fileno()
        )


class _QuietHandler(WSGIRequestHandler):
    def log_request(self, *_: Any) -> None:
        """Nothing: each click would be a line."""


def _static(name: str) -> Response:
    return Response((_STATIC / name).read_bytes(), mimetype=mimetypes.guess_type(name)[0])


def _json(content: Any, status: int = 200) -> Response:
    return Response(json.dumps(content), status, mimetype="application/json")
