"""Reading images of any kind."""

import warnings
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from .errors import UserError

# Masks have the size of the image: a hundred of them take 100 bytes for each of these pixels.
MAX_PIXELS = 64_000_000


class UnreadableError(UserError):
    """An input that is not an image or video, or one that is not supported."""


def as_rgb(image: Any, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """(H, W, 3) uint8, RGB, from a path, a PIL image or such an array.

    Raises:
        UnreadableError: the input is none of these; see also ``read_image``.
    """
    if isinstance(image, str | Path):
        return read_image(image, max_pixels=max_pixels)
    if isinstance(image, Image.Image):
        return _pixels(image, max_pixels)
    if isinstance(image, np.ndarray):
        if image.ndim == 3 and image.shape[2] == 3 and image.dtype == np.uint8 and image.size:
            return image
        kind = f"an array {image.shape} of {image.dtype}"
    else:
        kind = type(image).__name__
    raise UnreadableError(
        f"an image is a path, a PIL image or an RGB array (H, W, 3) of uint8, not {kind}"
    )


def read_image(path: str | Path, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Read any image as Detectron2's loader would, and also 16-bit ones, scaled by 1/256.

    EXIF orientation is applied, an alpha channel is dropped, gray becomes RGB. Of an image with
    several frames the first is taken.

    Args:
        path: of a file.
        max_pixels: larger images are refused before they are decoded; 0 for no limit.

    Returns:
        (H, W, 3) uint8, RGB.

    Raises:
        UnreadableError: with the reason.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # max_pixels is ours
            with Image.open(path) as image:
                return _pixels(image, max_pixels)
    except UnidentifiedImageError:
        return _read_with_opencv(path)
    except Image.DecompressionBombError as error:
        raise UnreadableError(f"too large ({error})") from error
    except FileNotFoundError:
        raise UnreadableError(f"no file {path}") from None
    except (OSError, ValueError, SyntaxError) as error:
        raise UnreadableError(f"cannot be read ({error})") from error


def _pixels(image: Image.Image, max_pixels: int) -> np.ndarray:
    width, height = image.size
    if 0 < max_pixels < width * height:
        raise UnreadableError(
            f"{width} x {height} pixels are {width * height / 1e6:.1f} megapixels, more than the "
            f"limit of {max_pixels / 1e6:g}"
        )
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):  # one channel of more than 8 bits
        return _to_8_bit(np.asarray(image))
    return np.asarray(image.convert("RGB"))


def _read_with_opencv(path: str | Path) -> np.ndarray:
    """Pillow has no 16-bit RGB TIFF; OpenCV does, and has a limit of its own of 1 gigapixel."""
    array = cv2.imread(str(path), cv2.IMREAD_UNCHANGED | cv2.IMREAD_IGNORE_ORIENTATION)
    if array is None:
        raise UnreadableError("not an image")
    if array.ndim == 3:
        array = array[:, :, 2::-1] if array.shape[2] >= 3 else array[:, :, 0]
    return _to_8_bit(array)


def _to_8_bit(array: np.ndarray) -> np.ndarray:
    """(H, W) or (H, W, 3) of 8 or 16 bits to (H, W, 3) uint8."""
    if array.dtype.kind not in "ui" or array.min() < 0 or array.max() > 65535:
        raise UnreadableError(f"pixels of type {array.dtype} are not supported, only 8 and 16 bits")
    if array.dtype != np.uint8:
        array = (array // 256).astype(np.uint8)
    return np.ascontiguousarray(np.dstack([array] * 3) if array.ndim == 2 else array)
