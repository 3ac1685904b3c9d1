"""Targets of the predicted mask IoU."""

import numpy as np
import pytest
import torch
from detectron2.structures import BitMasks, PolygonMasks
from hypothesis import given, settings
from hypothesis import strategies as st

from solo_d2.modeling.centermask.mask_iou import crop_masks, mask_iou_targets, visible_share

SIZE = (64, 96)
EMPTY = torch.zeros(1, *SIZE, dtype=torch.bool)


def rectangle(x1, y1, x2, y2) -> torch.Tensor:
    mask = torch.zeros(1, *SIZE, dtype=torch.bool)
    mask[:, y1:y2, x1:x2] = True
    return mask


def test_cropping_bitmasks_by_index_is_detectron2s_cropping():
    masks = torch.cat([rectangle(10, 10, 50, 50), rectangle(30, 5, 80, 60), rectangle(0, 0, 9, 9)])
    index = [1, 0, 1, 1, 2, 2]
    boxes = [[25.5, 0, 81, 62.25], [10, 10, 50, 50], [-9, -9, 50, 70], [40, 40, 40, 40]]
    boxes = np.float32([*boxes, [96, 64, 120, 80], [-20, -20, -5, 0.5]])
    expected = BitMasks(masks)[index].crop_and_resize(torch.from_numpy(boxes), 28)
    assert torch.equal(crop_masks(BitMasks(masks), index, boxes, 28), expected)


side = st.integers(-20, 120)


@given(st.lists(st.tuples(side, side, side, side), min_size=1, max_size=4))
@settings(max_examples=50, deadline=None)
def test_the_visible_share_of_a_rectangle_is_its_intersection(boxes):
    object_box = [20, 10, 70, 50]
    shares = visible_share(
        BitMasks(rectangle(*object_box)),
        [0] * len(boxes),
        np.float32(boxes),
    )
    for (x1, y1, x2, y2), share in zip(boxes, shares.tolist()):
        width = max(0, min(x2, 70) - max(x1, 20))
        height = max(0, min(y2, 50) - max(y1, 10))
        assert share == pytest.approx(width * height / (50 * 40), abs=1e-6)


def test_a_box_between_pixels_covers_parts_of_them():
    boxes = np.float32([[19.25, 9.5, 40.25, 30.5], [60.5, 40.25, 80.9, 60.9]])
    shares = visible_share(BitMasks(rectangle(20, 10, 70, 50)), [0, 0], boxes)
    # 20.25 x 20.5 pixels, and 9.5 x 9.75
    assert shares.tolist() == pytest.approx([20.25 * 20.5 / 2000, 9.5 * 9.75 / 2000], abs=1e-6)


def test_polygons_and_bitmasks_of_nothing_have_no_share():
    index, boxes = [0], np.float32([[0.0, 0.0, 10.0, 10.0]])
    assert visible_share(BitMasks(EMPTY), index, boxes).tolist() == [0]
    line = PolygonMasks([[[0.0, 0.0, 5.0, 5.0, 9.0, 9.0]]])
    assert visible_share(line, index, boxes).tolist() == [0]
    ordinary = PolygonMasks([[[0.0, 0.0, 9.0, 0.0, 9.0, 9.0]]])
    assert visible_share(ordinary, index, np.float32([[3.0, 3.0, 3.5, 8.0]])).tolist() == [0]


def test_the_iou_target_counts_what_of_the_object_is_outside_of_the_box():
    predicted, target = (
        torch.zeros(3, 4, 4, dtype=torch.bool),
        torch.zeros(3, 4, 4, dtype=torch.bool),
    )
    predicted[:, :, :2] = True  # 8 pixels
    target[:2, :2] = True  # 8 pixels, of which 4 are predicted
    iou = mask_iou_targets(predicted, target, torch.tensor([1.0, 0.5, 0.0]))
    assert iou.tolist() == pytest.approx([4 / 12, 4 / 20, 0])
