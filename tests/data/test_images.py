"""The image reader: 8 bits as in Detectron2, more bits scaled, the rest refused with a reason."""

import cv2
import numpy as np
import pytest
from detectron2.data import detection_utils
from PIL import Image

from solo_d2.data.images import ImageError, read_image

GRAY = np.arange(24, dtype=np.uint8).reshape(4, 6) * 10
COLOR = np.stack([GRAY, GRAY + 5, 255 - GRAY], axis=-1)


@pytest.mark.parametrize("image_format", ["RGB", "BGR", "L"])
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1", "LA"])
def test_8_bits_are_read_as_by_detectron2(tmp_path, mode, image_format):
    path = tmp_path / "a.png"
    Image.fromarray(COLOR).convert(mode).save(path)
    expected = detection_utils.read_image(str(path), image_format)
    assert np.array_equal(read_image(path, image_format), expected)


def test_exif_orientation_is_applied(tmp_path):
    image = Image.fromarray(COLOR)
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(read_image(tmp_path / "a.png"), np.rot90(COLOR, -1))


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bits_are_divided_by_257(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(GRAY.astype(np.uint16) * 257).save(path)
    assert np.array_equal(read_image(path), np.stack([GRAY] * 3, axis=-1))


def test_color_of_16_bits_too(tmp_path):
    path = str(tmp_path / "a.tif")
    cv2.imwrite(path, COLOR[..., ::-1].astype(np.uint16) * 257)
    assert np.array_equal(read_image(path), COLOR)
    assert np.array_equal(read_image(path, "BGR"), COLOR[..., ::-1])


def test_floats_from_0_to_1_are_multiplied_by_255(tmp_path):
    path = tmp_path / "a.tif"
    Image.fromarray((GRAY / 255).astype(np.float32)).save(path)
    assert np.array_equal(read_image(path)[..., 0], GRAY)


@pytest.mark.parametrize(
    "values",
    [
        GRAY.astype(np.float32),
        np.full((4, 6), np.nan, np.float32),
        GRAY.astype(np.float32) / 255 - 0.5,
        GRAY.astype(np.int32) - 50,
        GRAY.astype(np.int32) * 10_000,
    ],
    ids=["floats to 230", "nan", "negative floats", "negative integers", "32 bits"],
)
def test_other_ranges_are_refused(tmp_path, values):
    path = tmp_path / "a.tif"
    Image.fromarray(values).save(path)
    with pytest.raises(ImageError, match="has values from"):
        read_image(path)


def test_broken_files_say_why(tmp_path):
    path = tmp_path / "a.png"
    with pytest.raises(FileNotFoundError):
        read_image(path)
    path.write_text("hello")
    with pytest.raises(ImageError, match="not an image"):
        read_image(path)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(ImageError, match="cannot be read .*truncated"):
        read_image(path)
