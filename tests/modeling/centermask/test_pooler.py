"""RoIAlign from the level that fits a box."""

import pytest
import torch
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes

from solo_d2.modeling.centermask.pooler import AdaptiveROIPooler


def test_half_precision_does_not_round_the_coordinates_of_pooled_boxes():
    pooler = AdaptiveROIPooler(output_size=7, strides=[8])
    ramp = torch.arange(200.0).expand(1, 1, 4, 200) / 256
    box = Boxes(torch.tensor([[1201.3, 2.0, 1260.9, 30.0]]))
    full = pooler([ramp], [box], [(32, 1600)])
    half = pooler([ramp.half()], [box], [(32, 1600)])
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, full, rtol=0, atol=1e-3)


def boxes_of(*numbers: int) -> list[Boxes]:
    """The given numbers of random boxes per image."""
    torch.manual_seed(0)
    corners = [torch.rand(n, 4) * 60 for n in numbers]
    return [Boxes(torch.cat([x[:, :2], x[:, :2] + x[:, 2:]], dim=1)) for x in corners]


@pytest.mark.parametrize("numbers", [(7, 5), (0, 3), (0, 0)])
def test_by_area_it_is_detectron2s_pooler(numbers):
    boxes = boxes_of(*numbers)
    features = [torch.randn(2, 3, 64 // stride, 96 // stride) for stride in (1, 2, 4)]
    ours = AdaptiveROIPooler(output_size=5, strides=[1, 2, 4], criterion="area")
    theirs = ROIPooler(5, [1, 1 / 2, 1 / 4], sampling_ratio=0, pooler_type="ROIAlignV2")
    actual = ours(features, boxes, [(64, 96), (60, 80)])
    assert torch.equal(actual, theirs(features, boxes))


def test_each_box_is_pooled_from_its_own_level_in_the_order_given():
    sides = [[10, 60, 30], [58, 8]]
    boxes = [Boxes(torch.tensor([[0.0, 0, side, side] for side in image])) for image in sides]
    pooler = AdaptiveROIPooler(output_size=2, strides=[1, 2, 4])
    levels = [torch.full((2, 1, 64 // s, 96 // s), float(i)) for i, s in enumerate((1, 2, 4))]
    for level in levels:
        level.requires_grad_()
    pooled = pooler(levels, boxes, [(64, 96), (60, 80)])
    # more than half of the image: the coarsest; more than a quarter: the next
    expected = pooler.assign(boxes, [(64, 96), (60, 80)])
    assert expected.tolist() == [0, 2, 0, 2, 0]
    assert torch.equal(pooled.detach().amax(dim=(1, 2, 3)), expected.float())
    pooled.sum().backward()
    assert [level.grad.any().item() for level in levels] == [True, False, True]


def test_levels_without_boxes_are_connected():
    levels = [torch.randn(1, 1, 8, 8, requires_grad=True) for _ in range(2)]
    pooler = AdaptiveROIPooler(output_size=2, strides=[8, 16])
    pooler(levels, [Boxes(torch.zeros(0, 4))], [(64, 64)]).sum().backward()
    assert all(level.grad is not None for level in levels)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"criterion": "size"}, "criterion must be one of ratio, area, not 'size'"),
        ({"strides": [8, 32]}, "strides must be successive powers of 2"),
    ],
)
def test_unsupported_values_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        AdaptiveROIPooler(**{"output_size": 14, "strides": [8, 16]} | options)
