"""Parts of YOLACT's network."""

import pytest
import torch
from detectron2.layers import ShapeSpec

from solo_d2.modeling.yolact.head import (
    MaskRater,
    YOLACTPyramid,
    inside_boxes,
    scale_boxes,
)

SHAPES = {f"res{k}": ShapeSpec(channels=2**k, stride=2**k) for k in (2, 3, 4, 5)}


def test_crop_keeps_columns_by_their_index_with_padding_at_either_end():
    boxes = torch.tensor([[2.5, 1.0, 4.0, 3.0], [4.0, 3.0, 2.5, 1.0]])
    inside = inside_boxes(boxes, (6, 8), padding=1.0)
    # columns c with 1.5 <= c < 5, rows with 0 <= r < 4
    assert inside[0].any(dim=0).nonzero()[:, 0].tolist() == [2, 3, 4]
    assert inside[0].any(dim=1).nonzero()[:, 0].tolist() == [0, 1, 2, 3]
    assert torch.equal(inside[0], inside[1])


def test_boxes_are_scaled_along_each_axis():
    boxes = torch.tensor([[10.0, 20.0, 30.0, 40.0]])
    assert scale_boxes(boxes, (100, 50), (10, 100)).tolist() == [[20, 2, 60, 4]]


def test_mask_rater_takes_masks_of_any_size():
    rater = MaskRater(num_classes=4)
    for size in ((1, 1), (62, 200), (63, 63), (138, 138)):
        ious = rater(torch.rand(2, *size))
        assert ious.shape == (2, 4) and (ious >= 0).all()
    assert rater(torch.rand(0, 20, 20)).shape == (0, 4)


def test_pyramid_levels_halve_whatever_the_sizes_of_the_features():
    pyramid = YOLACTPyramid(SHAPES, in_features=["res3", "res4"], out_channels=6, num_levels=4)
    features = {"res3": torch.rand(1, 8, 69, 13), "res4": torch.rand(1, 16, 35, 7)}
    sizes = [tuple(level.shape[1:]) for level in pyramid(features)]
    assert sizes == [(6, 69, 13), (6, 35, 7), (6, 18, 4), (6, 9, 2)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"in_features": ["res9"]}, r"in_features must be some of .*'res5'\], not \['res9'\]"),
        ({"in_features": []}, r"in_features must be some of"),
        (
            {"in_features": ["res3", "res5"]},
            r"in_features must have strides that double.*\[8, 32\]",
        ),
        (
            {"in_features": ["res3", "res4"], "num_levels": 1},
            "num_levels must be at least 2.*not 1",
        ),
    ],
)
def test_an_unsupported_value_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        YOLACTPyramid(SHAPES, **options)
