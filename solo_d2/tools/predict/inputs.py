"""Finding the inputs of a command line: files, folders, patterns, webcams and URLs."""

import glob
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from solo_d2.errors import UserError
from solo_d2.images import UnreadableError

IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
VIDEO_SUFFIXES = {".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm"}


class Source(NamedTuple):
    location: str  # path, URL, or the number of a webcam
    name: Path  # relative to the input that it was found under

    @property
    def is_live(self) -> bool:
        """Whether this is a webcam or a URL, not a file."""
        return "://" in self.location or self.location.isdecimal()

    @property
    def is_video(self) -> bool:
        return self.is_live or self.name.suffix.lower() in VIDEO_SUFFIXES


class Video:
    """Iterates over the frames of a video, (H, W, 3) uint8 RGB."""

    def __init__(self, source: Source):
        """
        Raises:
            UnreadableError: it cannot be opened.
        """
        where = source.location
        self._capture = cv2.VideoCapture(int(where) if where.isdecimal() else where)
        if not self._capture.isOpened():
            kind = "webcam or video that can be opened" if source.is_live else "video"
            raise UnreadableError(f"not a {kind}")
        self.rate = self._capture.get(cv2.CAP_PROP_FPS) or 25.0
        self.length = max(0, int(self._capture.get(cv2.CAP_PROP_FRAME_COUNT))) or None

    def __iter__(self) -> Iterator[np.ndarray]:
        try:
            while (read := self._capture.read())[0]:
                yield read[1][:, :, ::-1]
        finally:
            self._capture.release()


def find_sources(inputs: Sequence[str], exclude: Path) -> list[Source]:
    """The sources in files, folders (with subfolders), glob patterns, URLs and webcam numbers.

    Args:
        inputs: as given on the command line.
        exclude: the output folder; files under it are not inputs.

    Raises:
        UserError: an input matches nothing.
    """
    sources: dict[str, Source] = {}
    for text in inputs:
        found = 0
        for source in _expand(text):
            path = source.location if source.is_live else str(Path(source.location).resolve())
            if exclude.resolve() not in Path(path).parents:
                sources.setdefault(path, source)
                found += 1
        if not found:
            raise UserError(f"no image or video matches {text!r}")
    return list(sources.values())


def output_names(sources: Iterable[Source]) -> list[Path]:
    """A unique relative path for each source's picture or video."""
    taken: set[str] = set()
    names = []
    for source in sources:
        kept, suffix = ({".mp4"}, ".mp4") if source.is_video else ({".jpg", ".png"}, ".png")
        # "scan.tiff" becomes "scan.tiff.png", so that it differs from "scan.png"
        name = source.name
        name = name if name.suffix.lower() in kept else name.with_name(name.name + suffix)
        number, stem = 1, name.stem
        while str(name).lower() in taken:  # some file systems ignore case
            number += 1
            name = name.with_name(f"{stem}_{number}{name.suffix}")
        taken.add(str(name).lower())
        names.append(name)
    return names


def _expand(text: str) -> Iterator[Source]:
    path = Path(text)
    if path.is_dir():
        for file in sorted(path.rglob("*")):
            if file.suffix.lower() in IMAGE_SUFFIXES | VIDEO_SUFFIXES and file.is_file():
                yield Source(str(file), file.relative_to(path))
    elif path.exists():  # a named file is tried with any suffix
        yield Source(text, Path(path.name))
    elif text.isdecimal():
        yield Source(text, Path(f"webcam{text}"))
    elif "://" in text:
        name = "".join(c if c.isalnum() or c in ".-_" else "_" for c in text.split("://", 1)[1])
        yield Source(text, Path(name[-80:]))
    else:
        for match in sorted(glob.glob(text, recursive=True)):
            if Path(match).is_file():
                yield Source(match, Path(Path(match).name))
