"""The only reader of image files, used by training, evaluation, prediction and pictures."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from detectron2.data import detection_utils
from detectron2.utils.file_io import PathManager
from PIL import Image, ImageOps, UnidentifiedImageError

_ORIENTATION = 0x0112  # the EXIF tag


class ImageError(ValueError):
    """An image that cannot be read; the message gives the reason but not the file name."""


def read_image(path: str | Path, image_format: str = "RGB") -> np.ndarray:
    """Read an image file of 8 or more bits per channel.

    EXIF orientation is applied, an alpha channel is dropped, gray becomes color, and of several
    frames the first is read. 8-bit images are read as in Detectron2. 16-bit values are divided by
    257, so that 65535 becomes 255; floats from 0 to 1 are multiplied by 255.

    Args:
        path: path of the file.
        image_format: "RGB", "BGR" or another format of Detectron2's ``read_image``.

    Returns:
        (H, W, C) uint8; see ``detectron2.data.detection_utils.read_image`` for other formats.

    Raises:
        FileNotFoundError: there is no such file.
        ImageError: it is not an image, is broken, or has an unknown range of values.
    """
    with _image_errors(), PathManager.open(str(path), "rb") as file:
        try:
            image: Image.Image = Image.open(file)
        except UnidentifiedImageError:
            image = Image.fromarray(_to_8_bit(_read_with_opencv(path)))
        image.load()
        try:
            image = ImageOps.exif_transpose(image)
        except Exception:  # broken EXIF data raises many errors; Detectron2 ignores it too
            pass
        if _is_deep(image):
            image = Image.fromarray(_to_8_bit(np.asarray(image)))
        return detection_utils.convert_PIL_to_numpy(image, image_format)


class Header(NamedTuple):
    """What is known of an image file without decoding it."""

    size: tuple[int, int]  # width and height of the image that ``read_image`` returns
    orientation: int  # EXIF, 1 to 8; 1 is upright, and from 5 on the file has height and width
    is_deep: bool  # more than 8 bits per channel


def read_header(path: str | Path) -> Header:
    """Read the header of an image file; files that Pillow does not know are decoded.

    Raises:
        FileNotFoundError, ImageError: see ``read_image``.
    """
    with _image_errors():
        try:
            with PathManager.open(str(path), "rb") as file, Image.open(file) as image:
                turn = _orientation(image)
                size = image.size[::-1] if turn >= 5 else image.size
                return Header(size, turn, _is_deep(image))
        except UnidentifiedImageError:
            height, width = read_image(path).shape[:2]
            return Header((width, height), 1, is_deep=True)


@contextmanager
def _image_errors() -> Iterator[None]:
    """Turn the many errors of broken images into ``ImageError``."""
    try:
        yield
    except (FileNotFoundError, ImageError, UnidentifiedImageError):
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ImageError(f"cannot be read ({error})") from error


def _is_deep(image: Image.Image) -> bool:
    return image.mode.startswith(("I", "F"))


def _orientation(image: Image.Image) -> int:
    if image.format == "PNG" and "exif" not in image.info:  # Pillow would decode the whole file
        return 1
    try:
        found = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # see ``read_image``
        return 1
    return found if found in range(1, 9) else 1


def _read_with_opencv(path: str | Path) -> np.ndarray:
    """Read formats that Pillow does not support, such as 16-bit color TIFF."""
    local = PathManager.get_local_path(str(path))
    array = cv2.imread(local, cv2.IMREAD_UNCHANGED | cv2.IMREAD_IGNORE_ORIENTATION)
    if array is None:
        raise ImageError("not an image")
    if array.ndim == 3:
        array = array[:, :, 2::-1] if array.shape[2] >= 3 else array[:, :, 0]
    return array


def _to_8_bit(array: np.ndarray) -> np.ndarray:
    """See ``read_image``."""
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    low, high = array.min(), array.max()
    if array.dtype.kind == "f" and 0 <= low and high <= 1:  # not NaN
        factor = 255.0
    elif array.dtype.kind in "iu" and 0 <= low and high <= 65535 and array.dtype.itemsize <= 4:
        factor = 1 / 257  # Pillow gives some 16-bit files as 32-bit integers
    else:
        raise ImageError(
            f"has values from {low:g} to {high:g} ({array.dtype}); supported are 8 bits, 16 bits "
            "and floats from 0 to 1"
        )
    return np.rint(array.astype(np.float64) * factor).astype(np.uint8)
