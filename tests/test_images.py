"""Reading images: every kind becomes RGB of 8 bits, or is refused in one line."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from solo_d2.images import UnreadableError, as_rgb, read_image


def save(path, array, **options):
    Image.fromarray(array).save(path, **options)
    return path


def ramp(height=20, width=30, channels=3):
    array = np.arange(height * width * channels, dtype=np.uint8)
    return array.reshape(height, width, channels).squeeze()


def test_rgb_gray_and_rgba_become_three_channels(tmp_path):
    rgb = ramp()
    assert (read_image(save(tmp_path / "a.png", rgb)) == rgb).all()
    assert (read_image(save(tmp_path / "b.png", ramp(channels=4))).shape) == (20, 30, 3)
    gray = read_image(save(tmp_path / "c.png", ramp(channels=1)))
    assert gray.shape == (20, 30, 3) and (gray[..., 0] == ramp(channels=1)).all()


@pytest.mark.parametrize("name", ["gray.png", "gray.tiff"])
def test_16_bit_gray_is_scaled_not_clipped(tmp_path, name):
    array = (np.arange(600, dtype=np.uint16) * 100).reshape(20, 30)
    image = read_image(save(tmp_path / name, array))
    assert (image == (array // 256)[..., None]).all()


@pytest.mark.parametrize("name", ["color.png", "color.tiff"])
def test_16_bit_color_keeps_its_channel_order(tmp_path, name):
    array = np.zeros((20, 30, 3), dtype=np.uint16)
    array[..., 0], array[..., 1] = 60000, 20000  # red, green
    assert cv2.imwrite(str(tmp_path / name), array[..., ::-1])
    image = read_image(tmp_path / name)
    assert np.abs(image.astype(int) - (array // 256)).max() <= 1


def test_exif_rotation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by 90 degrees
    path = save(tmp_path / "turned.jpg", ramp(20, 30), exif=exif)
    assert read_image(path).shape == (30, 20, 3)
    with Image.open(path) as image:
        assert as_rgb(image).shape == (30, 20, 3)


def test_float_image_is_refused_by_its_type(tmp_path):
    path = save(tmp_path / "float.tiff", np.ones((4, 5), dtype=np.float32))
    with pytest.raises(UnreadableError, match="float32"):
        read_image(path)


def test_large_image_is_refused_before_it_is_decoded_unless_the_limit_is_raised(tmp_path):
    path = tmp_path / "bomb.png"
    Image.new("1", (12000, 9000)).save(path)
    assert path.stat().st_size < 400_000
    with pytest.raises(UnreadableError, match="108.0 megapixels, more than the limit of 64"):
        read_image(path)
    small = save(tmp_path / "small.png", ramp(20, 30))
    with pytest.raises(UnreadableError, match="20"):
        read_image(small, max_pixels=599)
    assert read_image(small, max_pixels=600).shape == read_image(small, max_pixels=0).shape


@pytest.mark.parametrize("content", [b"hello", b""])
def test_what_is_not_an_image_is_refused(tmp_path, content):
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with pytest.raises(UnreadableError, match="not an image"):
        read_image(path)
    with pytest.raises(UnreadableError, match=r"none\.png"):
        read_image(tmp_path / "none.png")


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
