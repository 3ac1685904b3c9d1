"""Images are embedded once; masks as runs; known objects are not offered again."""

from types import SimpleNamespace

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from colored_boxes import BOXES, HEIGHT, WIDTH, SameColor, box_mask, picture
from PIL import Image

from solo_d2.errors import UserError
from solo_d2.tools.click_page import segmenter as module
from solo_d2.tools.click_page.segmenter import (
    Segmenter,
    describe,
    rle_of,
    tensor_bytes,
    union,
)


def test_runs_go_down_the_columns_from_the_background():
    mask = np.array([[0, 1, 1], [0, 1, 0]], bool)
    assert describe(mask) == {"area": 3, "box": [1, 0, 2, 2], "counts": [2, 3, 1]}
    assert describe(np.ones((2, 2), bool))["counts"] == [0, 4]
    assert describe(mask[:, ::-1])["counts"] == [0, 1, 1, 2, 2]


def test_runs_are_those_of_coco():
    masks = np.random.default_rng(0).random((20, 7, 9)) < 0.4
    for mask in masks:
        assert (mask_util.decode(rle_of(describe(mask)["counts"], 7, 9)) == mask).all()
    runs = [describe(mask)["counts"] for mask in masks[:2]]
    assert (union(runs, 7, 9) == masks[:2].any(axis=0)).all()
    assert not union([], 7, 9).any()


@pytest.mark.parametrize("counts", [[5], [0, 64], [-1, 64], "63", None, [[0], 63], [63]])
def test_other_runs_are_refused(counts):
    with pytest.raises(ValueError):
        rle_of(counts, 7, 9)


def test_a_click_finds_an_object_and_more_clicks_change_it(segmenter, images):
    path = images / "one.png"
    found = segmenter.click(path, [[45, 30]], [1], [], [])
    assert found == {
        "class": "disc",
        "score": pytest.approx(0.9),
        **describe(box_mask(*BOXES[1])),
    }
    two = segmenter.click(path, [[45, 30], [10, 10]], [1, 1], [], [])
    assert two["area"] == 20 * 40 + 20 * 15
    # the boxes of the same color are told apart by the point that is nearer
    both = segmenter.click(path, [[15, 40]], [1], [], [])
    one = segmenter.click(path, [[15, 40], [70, 40]], [1, 0], [], [])
    assert (both["area"], one["box"]) == (200, [10, 35, 10, 10])


def test_clicks_change_a_mask_that_is_not_from_clicks(segmenter, images):
    path, base = images / "one.png", [describe(box_mask(0, 0, 30, 30))["counts"]]
    assert segmenter.click(path, [[45, 30]], [1], [], base)["area"] == 30 * 30 + 20 * 40
    without = segmenter.click(path, [[10, 10]], [0], [], base)  # another object, the red one
    assert without["area"] == 30 * 30 - 20 * 15


@pytest.mark.parametrize("labels", [[], [2], [0], ["1"], [1, 1]])
def test_wrong_labels_are_refused(segmenter, images, labels):
    with pytest.raises(ValueError, match="must be"):
        segmenter.click(images / "one.png", [[45, 30]], labels, [], [])


def test_a_large_image_is_reduced_but_its_masks_have_its_size(segmenter, images, monkeypatch):
    path, box = images / "large.png", np.array(BOXES[1])
    Image.fromarray(picture().repeat(10, axis=0).repeat(10, axis=1)).save(path)
    monkeypatch.setattr(module, "_LARGEST_SIDE", WIDTH)
    found = segmenter.click(path, [[10 * x for x in (45, 30)]], [1], [], [])
    mask = union([found["counts"]], 10 * HEIGHT, 10 * WIDTH)
    left, top, right, bottom = 10 * box
    expected = np.zeros_like(mask)
    expected[top:bottom, left:right] = True
    assert (mask & expected).sum() / (mask | expected).sum() > 0.98
    # where a click changes nothing, the mask stays as it is
    fine = np.zeros_like(mask)
    fine[50:200, 51:247] = True
    both = segmenter.click(path, [[450, 300]], [1], [], [describe(fine)["counts"]])
    assert (union([both["counts"]], *mask.shape) == mask | fine).all()
    known = [describe(fine)["counts"]]
    rest = segmenter.click(path, [[300, 100]], [1], known, [])
    assert not (union([rest["counts"]], *mask.shape) & fine).any()


def test_known_objects_are_not_offered_again(segmenter, images):
    path = images / "one.png"
    known = describe(box_mask(*BOXES[2]))["counts"]
    assert segmenter.click(path, [[70, 40]], [1], [known], [])["box"] == [65, 35, 10, 10]
    everything = describe(np.ones((HEIGHT, WIDTH), bool))["counts"]
    assert segmenter.click(path, [[70, 40]], [1], [everything], []) is None


def test_the_automatic_mode_adds_what_is_new_and_certain(segmenter, images):
    found = segmenter.find_all(images / "one.png", [])
    assert [(x["class"], x["area"]) for x in found] == [("rod", 300), ("disc", 800)]
    left, top, right, bottom = BOXES[1]
    known = [box_mask(left, top, right, bottom - 25), box_mask(5, 5, 7, 20)]
    known = [describe(mask)["counts"] for mask in known]
    # less than half of the disc is left; the rod loses what is known
    assert [x["box"] for x in segmenter.find_all(images / "one.png", known[1:])] == [
        [7, 5, 18, 15],
        [40, 10, 20, 40],
    ]
    known[0] = describe(box_mask(left, top, right, bottom - 15))["counts"]
    assert [x["class"] for x in segmenter.find_all(images / "one.png", known)] == ["rod"]


def test_each_image_is_embedded_once_while_there_is_room(segmenter, images, monkeypatch):
    one, two = images / "one.png", images / "more" / "zwei & ü.png"
    for path in (one, two, one):
        assert segmenter.embed(path) == (HEIGHT, WIDTH)
        segmenter.click(path, [[45, 30]], [1], [], [])
    assert SameColor.embedded == 2
    monkeypatch.setattr(segmenter, "_cache_bytes", -1)  # room for one image
    for path in (one, one, two, one):
        segmenter.embed(path)
    assert SameColor.embedded == 4


def test_the_size_of_an_embedding_is_that_of_its_tensors():
    pair = (torch.zeros(3, dtype=torch.float32), [torch.zeros(2, 2, dtype=torch.int64), "text"])
    assert tensor_bytes(pair) == 12 + 32


def test_a_model_without_points_is_refused():
    with pytest.raises(UserError, match="needs AdaptIS, not Linear"):
        Segmenter(SimpleNamespace(takes_points=False, model=torch.nn.Linear(1, 1)))
