"""Assignment of locations to boxes, and its consequences."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from solo_d2.modeling.centermask.losses import BOX_LOSSES, box_loss
from solo_d2.modeling.centermask.pooler import assign_by_ratio
from solo_d2.modeling.centermask.targets import (
    assign_locations,
    box_distances,
    centerness,
    distances_to_boxes,
    level_locations,
)

NONE = 9  # in drawn tables
coordinate = st.integers(-40, 200).map(lambda n: n / 2)
box = st.tuples(coordinate, coordinate, coordinate, coordinate)
boxes_of_images = st.lists(st.lists(box, max_size=5), min_size=1, max_size=3)


def table(boxes, *, size=(4, 6), stride=8, radius=0.0) -> list[list[int]]:
    """Index of each cell's box, for one level that accepts boxes of all sizes."""
    boxes = torch.tensor(boxes, dtype=torch.float32).view(1, -1, 4)
    owner = assign_locations(boxes, [size], strides=[stride], borders=[], radius=radius)
    return owner.where(owner < boxes.shape[1], NONE).view(size).tolist()


def test_a_cell_learns_the_box_that_its_middle_is_in():
    # centers at 4, 12, 20, ...
    assert table([[3, 5, 21, 28.5]]) == [
        [9, 9, 9, 9, 9, 9],
        [0, 0, 0, 9, 9, 9],
        [0, 0, 0, 9, 9, 9],
        [0, 0, 0, 9, 9, 9],
    ]


def test_a_middle_on_the_border_is_not_in_the_box():
    assert table([[4, 4, 20, 20]], size=(3, 3)) == [[9, 9, 9], [9, 0, 9], [9, 9, 9]]


def test_the_smallest_box_has_the_cell_and_of_equal_ones_the_first():
    large, small = [0, 0, 48, 32], [8, 8, 24, 24]
    assert table([large, small, small]) == [
        [0, 0, 0, 0, 0, 0],
        [0, 1, 1, 0, 0, 0],
        [0, 1, 1, 0, 0, 0],
        [0, 0, 0, 0, 0, 0],
    ]


def test_centre_sampling_takes_the_cells_around_the_center():
    assert table([[0, 0, 48, 32]], radius=1.5) == [
        [9, 9, 9, 9, 9, 9],
        [9, 9, 0, 0, 9, 9],
        [9, 9, 0, 0, 9, 9],
        [9, 9, 9, 9, 9, 9],
    ]


def test_a_distance_on_a_border_belongs_to_both_levels():
    # 32 pixels from the center of the only cell to the furthest side
    boxes = torch.tensor([[[0.0, 0.0, 64.0, 64.0]]])
    sizes, strides = [(1, 1), (1, 1)], [64, 64]
    owner = assign_locations(boxes, sizes, strides=strides, borders=[32], radius=0)
    assert owner.tolist() == [[0, 0]]
    owner = assign_locations(boxes, sizes, strides=strides, borders=[31.5], radius=0)
    assert owner.tolist() == [[1, 0]]


def expected_owner(boxes, x, y, stride, limits, radius) -> int:
    """The rule, box by box."""
    claims = []
    for i, (x1, y1, x2, y2) in enumerate(boxes):
        left, top, right, bottom = x1, y1, x2, y2
        if radius:
            cx, cy, reach = (x1 + x2) / 2, (y1 + y2) / 2, radius * stride
            left, right = max(x1, cx - reach), min(x2, cx + reach)
            top, bottom = max(y1, cy - reach), min(y2, cy + reach)
        furthest = max(x - x1, y - y1, x2 - x, y2 - y)
        if left < x < right and top < y < bottom and limits[0] <= furthest <= limits[1]:
            claims.append(((x2 - x1) * (y2 - y1), i))
    return min(claims)[1] if claims else -1


@given(boxes_of_images, st.sampled_from([0, 1.5]))
@settings(max_examples=60, deadline=None)
def test_every_location_belongs_to_the_smallest_box_that_claims_it(images, radius):
    most = max(map(len, images))
    boxes = torch.zeros(len(images), most, 4)  # images with fewer boxes are padded
    for i, image in enumerate(images):
        boxes[i, : len(image)] = torch.tensor(image).view(-1, 4)
    sizes, strides, borders = [(5, 7), (3, 4)], [16, 32], [32.0]
    owner = assign_locations(boxes, sizes, strides=strides, borders=borders, radius=radius)
    limits = [(-1, 32.0), (32.0, float("inf"))]
    for i, image in enumerate(images):
        expected = []
        for size, stride, limit in zip(sizes, strides, limits):
            for x, y in level_locations(size, stride, torch.device("cpu")).tolist():
                expected.append(expected_owner(image, x, y, stride, limit, radius))
        actual = [n if n < most else -1 for n in owner[i].tolist()]
        assert actual == expected


def test_images_without_boxes_are_background():
    owner = assign_locations(torch.zeros(2, 0, 4), [(3, 3)], strides=[8], borders=[], radius=1.5)
    assert owner.shape == (2, 9) and not owner.any()


def test_broken_boxes_get_no_location():
    nan, inf = float("nan"), float("inf")
    broken = [[20, 20, 4, 4], [12, 0, 12, 24], [nan, nan, nan, nan], [inf, inf, inf, inf]]
    for radius in (0.0, 1.5):
        assert table(broken, size=(3, 3), radius=radius) == [[NONE] * 3] * 3


@given(st.lists(st.tuples(coordinate, coordinate, box), min_size=1))
def test_boxes_come_back_from_their_distances(pairs):
    points = torch.tensor([[x, y] for x, y, _ in pairs])
    boxes = torch.tensor([b for _, _, b in pairs])
    assert torch.equal(distances_to_boxes(points, box_distances(points, boxes)), boxes)


@given(st.lists(st.tuples(*[st.floats(0.125, 64, width=32)] * 4), min_size=1))
def test_centerness_is_1_only_in_the_middle(distances):
    values = centerness(torch.tensor(distances))
    assert ((values > 0) & (values <= 1)).all()
    middle = torch.tensor([[left, top, left, top] for left, top, _, _ in distances])
    assert torch.equal(centerness(middle), torch.ones(len(distances)))


def level(box_area, image_area=10000.0, **levels) -> int:
    levels = levels or {"min_level": 3, "max_level": 5}
    return assign_by_ratio(torch.tensor([box_area]), torch.tensor([image_area]), **levels).item()


@pytest.mark.parametrize(
    "share, expected",
    [(4, 2), (1, 2), (0.51, 2), (0.5, 1), (0.26, 1), (0.25, 0), (0.01, 0), (0, 0), (-0.5, 0)],
)
def test_the_level_follows_the_share_of_the_image(share, expected):
    assert level(share * 10000.0) == expected


def test_boxes_without_end_or_area_have_a_level():
    assert level(float("inf")) == 2
    assert level(1e-38) == 0
    assert level(0.2 * 10000.0, min_level=2, max_level=5) == 1  # with p2 there is one more


@given(st.lists(st.floats(0, 1e7, width=32), min_size=2), st.floats(1, 1e7, width=32))
def test_larger_boxes_are_never_pooled_from_finer_levels(areas, image_area):
    areas = torch.tensor(sorted(areas))
    images = torch.full_like(areas, image_area)
    levels = assign_by_ratio(areas, images, min_level=3, max_level=5)
    assert (levels.diff() >= 0).all()
    assert ((levels >= 0) & (levels <= 2)).all()


@pytest.mark.parametrize("name", BOX_LOSSES)
@given(st.lists(st.tuples(*[st.floats(0.0625, 64, width=32)] * 8), min_size=1))
def test_box_losses_are_0_for_equal_boxes_and_positive_for_others(name, values):
    predicted, target = torch.tensor(values).split(4, dim=1)
    loss = box_loss(predicted, target, name)
    assert loss.shape == (len(values),)
    assert torch.isfinite(loss).all() and (loss >= -1e-5).all()
    assert box_loss(target, target, name).abs().max() < 1e-6


def test_a_box_of_no_size_has_a_finite_loss_and_gradient():
    predicted = torch.zeros(1, 4, requires_grad=True)
    for name in BOX_LOSSES:
        predicted.grad = None
        box_loss(predicted, torch.full((1, 4), 0.25), name).sum().backward()
        assert torch.isfinite(predicted.grad).all()
