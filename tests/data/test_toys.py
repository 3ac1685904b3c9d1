"""Rods and tubes: exact masks of the visible parts, with the published numbers and sizes."""

import json
import zlib

import cv2
import numpy as np
import pycocotools.mask as mask_util
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from solo_d2.data import RODS, TUBES, toys

SETS = pytest.mark.parametrize("drawn", [RODS, TUBES], ids=lambda drawn: drawn.name)
# Objects per image, visible pixels and their median (adaptis.md, section 9).
RANGES = {
    "rods": {"count": (8, 25), "area": (20, 9 * 37), "median": (110, 200)},
    "tubes": {"count": (12, 52), "area": (20, 570), "median": (140, 240)},
}


def scenes(drawn, count=40, size=None):
    for index in range(count):
        yield drawn.draw_scene(np.random.default_rng([5, index]), *(size or drawn.image_size))


@SETS
def test_numbers_and_areas_are_those_of_the_recipe(drawn):
    counts, areas = [], []
    for image, objects in scenes(drawn):
        assert image.shape == (*drawn.image_size, 3) and image.dtype == np.uint8
        counts.append(len(objects))
        areas += [thing.mask.sum() for thing in objects]
    expected = RANGES[drawn.name]
    # a few objects are hidden or outside, so the minimum is not exact
    assert expected["count"][0] - 2 <= min(counts) and max(counts) <= expected["count"][1]
    assert np.ptp(counts) > 0.5 * np.ptp(expected["count"])
    assert expected["area"][0] <= min(areas) and max(areas) <= expected["area"][1]
    assert expected["median"][0] < np.median(areas) < expected["median"][1]


@SETS
def test_visible_parts_do_not_overlap_and_some_objects_are_partly_covered(drawn):
    in_parts = 0
    for _, objects in scenes(drawn, 15):
        masks = np.stack([thing.mask for thing in objects])
        assert masks.sum(0).max() == 1
        assert masks.sum((1, 2)).min() >= toys.MIN_PIXELS
        in_parts += sum(cv2.connectedComponents(m.astype(np.uint8))[0] > 2 for m in masks)
    assert in_parts >= 5


@SETS
def test_the_number_of_objects_follows_the_area_of_the_picture(drawn):
    height, width = drawn.image_size
    whole = np.mean([len(objects) for _, objects in scenes(drawn)])
    half = np.mean([len(objects) for _, objects in scenes(drawn, size=(height // 2, width))])
    assert half == pytest.approx(whole / 2, rel=0.25)


@SETS
def test_the_smallest_picture_works(drawn):
    for image, _ in scenes(drawn, 10, size=(32, 32)):
        assert image.shape == (32, 32, 3)


def clean_single(draw, monkeypatch):
    """Pictures of one object, without blurred or noisy ones: (image, mask, distance to edge)."""
    monkeypatch.setattr(toys, "_number", lambda *_: 1)
    for index in range(40):
        image, objects = draw(np.random.default_rng(index), 64, 64)
        far = cv2.dilate(
            np.any([o.mask for o in objects], axis=0).astype(np.uint8), np.ones((9, 9))
        )
        if len(objects) == 1 and (image[far == 0] == 255).all():
            distance = cv2.distanceTransform(objects[0].mask.astype(np.uint8), cv2.DIST_L2, 5)
            yield image.astype(float), objects[0].mask, distance


def test_rods_are_red_with_a_blue_rim_on_white(monkeypatch):
    sharp = 0
    for image, mask, distance in clean_single(toys.draw_rods, monkeypatch):
        beside = (cv2.dilate(mask.astype(np.uint8), np.ones((7, 7))) > 0) & (
            cv2.dilate(mask.astype(np.uint8), np.ones((3, 3))) == 0
        )
        if (image[beside] < 255).any():  # blurred
            continue
        sharp += 1
        red, _, blue = image[distance >= 3].mean(0)
        assert red > blue + 100
        red, _, blue = image[(distance > 0) & (distance <= 1)].mean(0)
        assert blue > red
    assert sharp >= 5


def test_one_lies_on_top_and_what_is_seen_through_it_is_darker():
    canvas = toys._Canvas(np.full((10, 30, 3), 200, np.float32))
    color = np.full((10, 20, 3), 100, np.float32)
    for left in (0, 10):
        canvas.add(np.full((10, 20), 3.0), (0, left), color, opacity=0.7)
    assert (canvas.top == np.repeat([0, 1], [10, 20])).all()
    only, overlap = canvas.image[0, 25, 0], canvas.image[0, 15, 0]
    assert 100 < overlap < only < 200
    bottom, top = (thing.mask for thing in canvas.objects())
    assert bottom.sum() == 100 and top.sum() == 200


def test_what_is_hardly_in_view_is_not_listed():
    canvas = toys._Canvas(np.full((10, 30, 3), 200, np.float32))
    for size in (toys.MIN_PIXELS - 1, toys.MIN_PIXELS):
        depth, corner = np.ones((1, size)), (size % 10, 0)
        canvas.add(depth, corner, np.zeros((1, size, 3)), opacity=1)
    assert [thing.mask.sum() for thing in canvas.objects()] == [toys.MIN_PIXELS]


def test_a_straight_stroke_has_the_depth_of_a_rod():
    points = np.array([[10.0, 8.0], [20.0, 8.0]])
    depth, corner = toys._stroke_depth(points, np.array([3.0, 3.0]), (16, 32))
    assert corner == (4, 6)
    at = {(y, x): depth[y - 4, x - 6] for y, x in [(7, 15), (7, 9), (10, 15), (11, 15)]}
    assert at[7, 15] == pytest.approx(2.5)  # its center is half a pixel from the axis
    assert at[10, 15] == pytest.approx(0.5) and at[11, 15] == pytest.approx(-0.5)
    assert at[7, 9] == pytest.approx(3 - np.hypot(0.5, 0.5))


def test_a_window_outside_of_the_picture_is_empty():
    points = np.array([[-40.0, -40.0], [-30.0, -40.0]])
    depth, corner = toys._stroke_depth(points, np.array([3.0, 3.0]), (16, 32))
    assert depth.size == 0 and corner == (0, 0)


@SETS
def test_files_are_lossless_and_equal_for_equal_parameters(drawn, tmp_path):
    for name in ("a", "b"):
        drawn.generate(tmp_path / name, count=2, size=(48, 64), seed=1, split="val")
    document = json.loads((tmp_path / "a/annotations/instances_val.json").read_text())
    assert document == json.loads((tmp_path / "b/annotations/instances_val.json").read_text())
    for index, image in enumerate(document["images"]):
        rng = np.random.default_rng([1, zlib.crc32(b"val"), index])
        expected, objects = drawn.draw_scene(rng, 48, 64)
        pixels = cv2.imread(str(tmp_path / "a/val" / image["file_name"]))[..., ::-1]
        np.testing.assert_array_equal(pixels, expected)
        written = [a for a in document["annotations"] if a["image_id"] == image["id"]]
        for annotation, thing in zip(written, objects, strict=True):
            mask = mask_util.decode(annotation["segmentation"]).astype(bool)
            np.testing.assert_array_equal(mask, thing.mask)


@SETS
def test_a_set_is_drawn_when_it_is_loaded(drawn, tmp_path, monkeypatch, request):
    monkeypatch.setenv("SOLO_D2_CACHE", str(tmp_path))
    request.addfinalizer(drawn.register)
    drawn.register(train_images=3, val_images=2, image_size=(48, 64), seed=4)
    assert not list(tmp_path.iterdir())
    assert MetadataCatalog.get(f"{drawn.name}_train").thing_classes == drawn.classes
    records = DatasetCatalog.get(f"{drawn.name}_val")
    assert [(r["height"], r["width"]) for r in records] == [(48, 64)] * 2
    assert "-2x48x64-seed4" in MetadataCatalog.get(f"{drawn.name}_val").json_file
