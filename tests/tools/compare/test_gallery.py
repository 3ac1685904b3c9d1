"""The gallery: outlines cover their masks, objects are matched, labels do not overlap."""

import re
from xml.etree import ElementTree

import cv2
import numpy as np
import pycocotools.mask as mask_util
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from solo_d2.tools.compare.gallery import SIDE, Entry, instance_color, match, outline
from solo_d2.tools.compare.html import page


def encode(mask):
    rle = mask_util.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(rle["size"]), "counts": rle["counts"].decode()}


def fill(path, height, width):
    """What the path covers."""
    canvas = np.zeros((height, width), dtype=np.uint8)
    loops = [
        np.array([[float(v) for v in p.split(",")] for p in loop.split("L")])
        for loop in re.findall(r"M([^Z]*)Z", path)
    ]
    cv2.fillPoly(canvas, [np.floor(loop).astype(np.int32) for loop in loops], 1)
    return canvas.astype(bool)


def groups(panel):
    return ElementTree.fromstring(panel.picture).findall("{*}g")


def test_outline_covers_the_mask_with_its_hole():
    y, x = np.mgrid[:90, :120]
    radius = np.hypot(y - 45, x - 60)
    mask = (radius < 40) & (radius > 15)
    path, box = outline(encode(mask), 2.0)
    assert box == (42, 12, 200, 170) or box == pytest.approx((40, 10, 202, 172), abs=4)
    big = cv2.resize(mask.astype(np.uint8), (240, 180), interpolation=cv2.INTER_NEAREST) > 0
    drawn = fill(path, 180, 240)
    assert (drawn & big).sum() / (drawn | big).sum() > 0.95
    assert path.count("M") == 2


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0.1, 0.5, 1.0, 3.7]))
def test_outline_of_any_mask_stays_in_its_box(seed, scale):
    rng = np.random.default_rng(seed)
    mask = cv2.blur(rng.random((40, 30)), (5, 5)) > 0.55
    path, (x1, y1, x2, y2) = outline(encode(mask), scale)
    assert bool(path) == bool(mask.any())
    for x, y in re.findall(r"([-\d.]+),([-\d.]+)", path):
        assert x1 - 1.6 <= float(x) <= x2 + 1.6 and y1 - 1.6 <= float(y) <= y2 + 1.6


def test_empty_and_tiny_masks_have_an_outline_or_none():
    mask = np.zeros((2000, 3000), dtype=bool)
    assert outline(encode(mask), 0.1) == ("", (0, 0, 0, 0))
    mask[1000, 1500] = True
    path, box = outline(encode(mask), 0.1)
    assert path.startswith("M") and box == pytest.approx((150, 100, 150.1, 100.1))


def test_each_object_is_found_once_by_the_best_but_a_crowd_again_and_again():
    overlaps = np.array([[0.6, 0.0], [0.9, 0.0], [0.0, 0.8], [0.0, 0.7], [0.4, 0.4]])
    assert match(overlaps, [False, True]) == [0, None, 1, 1, None]
    assert match(np.zeros((2, 0)), []) == [None, None]


def test_panels_are_the_truth_and_every_model_with_predictions(example_report):
    entry = Entry(example_report, example_report["gallery"][0], 0)
    assert [p.name for p in entry.panels] == ["ground truth", "alpha", "beta"]
    assert [p.note for p in entry.panels] == ["1 object", "mean IoU 0.93", "mean IoU 0.00"]
    del example_report["gallery"][0]["predictions"]["alpha"]
    entry = Entry(example_report, example_report["gallery"][0], 0)
    assert [(p.name, p.model) for p in entry.panels] == [("ground truth", None), ("beta", 1)]


def test_an_object_has_one_color_and_strays_are_dashed_and_hidden_below_the_threshold(
    example_report,
):
    truth, alpha, _ = Entry(example_report, example_report["gallery"][0], 0).panels
    (disc,) = groups(truth)
    stray, found = groups(alpha)  # the best is drawn last, on top
    assert found[0].get("stroke") == disc[0].get("stroke") == instance_color(0)
    assert found[0].get("stroke-dasharray") is None and found.get("hidden") is None
    assert stray[0].get("stroke-dasharray") and stray.get("hidden") is not None
    assert "matches no object" in stray.get("data-tip")


def test_labels_of_a_panel_do_not_overlap_and_the_best_have_one(example_report):
    data = example_report["gallery"][0]
    box = data["ground_truth"][0]["rle"]
    scores = [round(0.99 - 0.01 * i, 2) for i in range(60)]
    data["predictions"]["alpha"] = [{"class": "disc", "score": s, "rle": box} for s in scores]
    panel = Entry(example_report, data, 0).panels[1]
    texts = ElementTree.fromstring(panel.picture).findall("{*}text")
    assert texts[0].text == "disc 0.99"
    assert 3 < len(texts) < 40 == len(groups(panel))
    places = [(float(t.get("x")), float(t.get("y"))) for t in texts]
    for i, (x, y) in enumerate(places):
        for other_x, other_y in places[:i]:
            assert abs(y - other_y) >= 12 or abs(x - other_x) >= 60


def test_an_image_that_is_gone_is_grey_and_odd_sizes_are_drawn(example_report):
    data = example_report["gallery"][0]
    data["file_name"] = "/nowhere/gone.png"
    for size in ((60, 80), (1, 1), (2, 5000)):
        data.update(height=size[0], width=size[1], predictions={}, ground_truth=[])
        entry = Entry(example_report, data, 0)
        assert (entry.image == 128).all() and max(entry.width, entry.height) == SIDE
        assert "data:image/jpeg" in entry.definition() and entry.sheet()


def test_each_image_is_embedded_once_and_the_page_stays_small(example_report, monkeypatch):
    def make():
        gallery = example_report["gallery"]
        return page(example_report, [Entry(example_report, e, i) for i, e in enumerate(gallery)])

    assert make().count("data:image/jpeg") == 2
    monkeypatch.setattr("solo_d2.tools.compare.html._GALLERY_BUDGET", 10)
    source = make()
    assert source.count("data:image/jpeg") == 1, "the first is shown, however large"
    assert "Images shown: 1 of 2" in source
