"""Labels lie inside the image, do not overlap, and hide almost nothing of an object."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from solo_d2.label_layout import letters_mask, place_labels


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_places_are_inside_disjoint_and_cover_little(data):
    height, width = data.draw(st.integers(1, 80)), data.draw(st.integers(1, 80))
    owner = np.zeros((height, width), int)
    boxes, labels = [], []
    for number in range(1, data.draw(st.integers(0, 12)) + 1):
        left, top = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
        w, h = data.draw(st.integers(1, width - left)), data.draw(st.integers(1, height - top))
        owner[top : top + h, left : left + w] = number
        boxes.append((left, top, w, h))
        size = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 30))
        labels.append(np.zeros(size, np.uint8))
    places = place_labels(owner, boxes, labels)
    assert len(places) == len(boxes)
    labeled = np.zeros((height, width), int)
    for number, (place, letters) in enumerate(zip(places, labels, strict=True), 1):
        if place is None:
            continue
        (x, y), (h, w) = place, letters.shape
        assert x >= 0 and y >= 0 and x + w <= width and y + h <= height
        labeled[y : y + h, x : x + w] += 1
        covered = owner[y : y + h, x : x + w]
        for other in set(covered.ravel().tolist()) - {0, number}:
            assert (covered == other).sum() <= 0.05 * (owner == other).sum()
    assert labeled.max(initial=0) <= 1
    assert labeled.sum() <= 0.2 * height * width


def test_a_free_object_gets_its_label_above_and_a_full_image_within():
    owner = np.zeros((100, 200), int)
    owner[40:90, 50:120] = 1
    label = np.zeros((10, 30))
    assert place_labels(owner, [(50, 40, 70, 50)], [label]) == [(50, 30)]
    ((x, y),) = place_labels(np.ones((100, 200), int), [(0, 0, 200, 100)], [label])
    assert (x, y) == (85, 45)


def test_the_place_that_hides_no_other_object_is_taken():
    owner = np.zeros((100, 200), int)
    owner[40:60, 50:120] = 1
    owner[:40, :200] = 2  # above: allowed, but hides a little of this object
    assert place_labels(owner, [(50, 40, 70, 20)], [np.zeros((10, 30))]) == [(50, 60)]


def test_letters_fit_their_plate():
    for text in ("nucleus 98%", "Größe", "", "W" * 40):
        letters = letters_mask(text, 12)
        assert letters.dtype == np.uint8
        assert not letters[:, 0].any() and not letters[:, -1].any()
        assert bool(letters.any()) == bool(text)
