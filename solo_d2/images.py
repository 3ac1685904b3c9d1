"""The inputs that a predictor accepts as images."""

import contextlib
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from .data.images import ImageError, read_image
from .errors import UserError

# Masks have the size of the image: a hundred masks take 100 bytes per pixel.
MAX_PIXELS = 64_000_000


class UnreadableError(UserError):
    """An input that is not an image or video, or one that is not supported."""


def as_rgb(image: Any, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Convert an input to an (H, W, 3) uint8 RGB array.

    Args:
        image: a path, a PIL image, or an array of that kind. A file is read as in training.
        max_pixels: larger images are refused before they are decoded; 0: only Pillow's limit.

    Raises:
        UnreadableError: the input is of another kind, is too large, or cannot be read.
    """
    if isinstance(image, str | Path):
        return _read(image, max_pixels)
    if isinstance(image, Image.Image):
        _check_size(image.size, max_pixels)
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    if isinstance(image, np.ndarray):
        if image.ndim == 3 and image.shape[2] == 3 and image.dtype == np.uint8 and image.size:
            _check_size(image.shape[1::-1], max_pixels)
            return image
        kind = f"an array {image.shape} of {image.dtype}"
    else:
        kind = type(image).__name__
    raise UnreadableError(
        f"an image must be a path, a PIL image or an RGB array (H, W, 3) of uint8, not {kind}"
    )


def _read(path: str | Path, max_pixels: int) -> np.ndarray:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # max_pixels says more
            with contextlib.suppress(OSError), Image.open(path) as image:  # OSError: see below
                _check_size(image.size, max_pixels)
            pixels = read_image(path)
    except FileNotFoundError:
        raise UnreadableError(f"no file {path}") from None
    except (ImageError, Image.DecompressionBombError) as error:
        raise UnreadableError(str(error)) from error
    _check_size(pixels.shape[1::-1], max_pixels)  # for formats that Pillow does not know
    return pixels


def _check_size(size: tuple[int, ...], max_pixels: int) -> None:
    width, height = size
    if 0 < max_pixels < width * height:
        raise UnreadableError(
            f"{width} x {height} pixels are {width * height / 1e6:.1f} megapixels, more than the "
            f"limit of {max_pixels / 1e6:g}"
        )
