"""The only reader of image files, used by training, evaluation, prediction and pictures."""

from pathlib import Path

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
    try:
        with PathManager.open(str(path), "rb") as file, Image.open(file) as image:
            image.load()
            upright = _upright(image)
            if upright.mode.startswith(("I", "F")):  # one channel of more than 8 bits
                upright = Image.fromarray(_to_8_bit(np.asarray(upright)))
            return detection_utils.convert_PIL_to_numpy(upright, image_format)
    except FileNotFoundError:
        raise
    except UnidentifiedImageError:
        return _read_with_opencv(path, image_format)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, ImageError):
            raise
        raise ImageError(f"cannot be read ({error})") from error


def read_size(path: str | Path) -> tuple[int, int]:
    """(width, height) of the image that ``read_image`` returns, usually without decoding it.

    Raises:
        FileNotFoundError, ImageError: see ``read_image``.
    """
    try:
        with PathManager.open(str(path), "rb") as file, Image.open(file) as image:
            return image.size[::-1] if orientation(image) >= 5 else image.size
    except UnidentifiedImageError:
        height, width = read_image(path).shape[:2]
        return width, height
    except FileNotFoundError:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ImageError(f"cannot be read ({error})") from error


def orientation(image: Image.Image, *, decode: bool = False) -> int:
    """EXIF orientation of an opened file, 1 to 8; 1 is upright.

    Args:
        image: an opened image.
        decode: also look for EXIF data after the pixels of a PNG, which makes Pillow decode them.
    """
    if image.format == "PNG" and not decode and "exif" not in image.info:
        return 1
    try:
        found = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # broken EXIF data raises many errors; Detectron2 ignores it too
        return 1
    return found if found in range(1, 9) else 1


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # broken EXIF data raises many errors; Detectron2 ignores it too
        return image


def _read_with_opencv(path: str | Path, image_format: str) -> np.ndarray:
    """Read formats that Pillow does not support, such as 16-bit color TIFF."""
    local = PathManager.get_local_path(str(path))
    array = cv2.imread(local, cv2.IMREAD_UNCHANGED | cv2.IMREAD_IGNORE_ORIENTATION)
    if array is None:
        raise ImageError("not an image")
    if array.ndim == 3:
        array = array[:, :, 2::-1] if array.shape[2] >= 3 else array[:, :, 0]
    return detection_utils.convert_PIL_to_numpy(Image.fromarray(_to_8_bit(array)), image_format)


def _to_8_bit(array: np.ndarray) -> np.ndarray:
    """See ``read_image``."""
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    low, high = array.min(), array.max()
    if array.dtype.kind == "f" and 0 <= low and high <= 1:  # not NaN
        scaled = array.astype(np.float64) * 255
    elif array.dtype.kind in "iu" and 0 <= low and high <= 65535 and array.dtype.itemsize <= 4:
        # Pillow gives some 16-bit files as 32-bit integers
        scaled = array.astype(np.float64) / 257
    else:
        raise ImageError(
            f"has values from {low:g} to {high:g} ({array.dtype}); supported are 8 bits, 16 bits "
            "and floats from 0 to 1"
        )
    return np.rint(scaled).astype(np.uint8)
