"""Reading images: every kind becomes 8-bit RGB or is refused in one line."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from solo_d2.images import UnreadableError, as_rgb


def save(path, array, **options):
    Image.fromarray(array).save(path, **options)
    return path


def ramp(height=20, width=30, channels=3):
    array = np.arange(height * width * channels, dtype=np.uint8)
    return array.reshape(height, width, channels).squeeze()


def test_files_and_pil_images_are_turned_by_their_exif_data(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be rotated clockwise by 90 degrees
    path = save(tmp_path / "turned.jpg", ramp(20, 30), exif=exif)
    with Image.open(path) as image:
        assert as_rgb(image).shape == as_rgb(path).shape == (30, 20, 3)


def test_large_image_is_refused_before_it_is_decoded_unless_the_limit_is_raised(tmp_path):
    path = tmp_path / "bomb.png"
    Image.new("1", (12000, 9000)).save(path)
    assert path.stat().st_size < 400_000
    with pytest.raises(UnreadableError, match="108.0 megapixels, more than the limit of 64"):
        as_rgb(path)
    small = save(tmp_path / "small.png", ramp(20, 30))
    with pytest.raises(UnreadableError, match="20"):
        as_rgb(small, max_pixels=599)
    with pytest.raises(UnreadableError, match="limit"):
        as_rgb(ramp(20, 30), max_pixels=599)
    assert as_rgb(small, max_pixels=600).shape == as_rgb(small, max_pixels=0).shape


@pytest.mark.parametrize("content", [b"hello", b""])
def test_what_is_not_an_image_is_refused(tmp_path, content):
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with pytest.raises(UnreadableError, match="not an image"):
        as_rgb(path)
    with pytest.raises(UnreadableError, match=r"none\.png"):
        as_rgb(tmp_path / "none.png")


def test_paths_pil_images_and_arrays_are_taken(tmp_path):
    path = save(tmp_path / "a.png", ramp())
    for image in (path, str(path), Image.fromarray(ramp()), ramp()):
        assert (as_rgb(image) == ramp()).all()


@pytest.mark.parametrize(
    ("image", "kind"),
    [
        (np.zeros((4, 5)), r"array \(4, 5\) of float64"),
        (np.zeros((4, 5, 3)), "of float64"),
        (np.zeros((3, 4, 5), np.uint8), r"array \(3, 4, 5\)"),
        (np.zeros((0, 5, 3), np.uint8), r"array \(0, 5, 3\)"),
        (7, "int"),
        (None, "NoneType"),
        ({"image": Path("a.png")}, "dict"),
    ],
)
def test_other_inputs_are_told_what_is_taken(image, kind):
    with pytest.raises(
        UnreadableError, match=f"a path, a PIL image or an RGB array.* not .*{kind}"
    ):
        as_rgb(image)
