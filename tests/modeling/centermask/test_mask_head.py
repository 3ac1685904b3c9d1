"""The mask head with spatial attention."""

import torch
from detectron2.layers import ShapeSpec

from solo_d2.modeling.centermask.mask_head import SpatialAttentionMaskHead


def mask_head(num_classes: int = 3) -> SpatialAttentionMaskHead:
    torch.manual_seed(0)
    shape = ShapeSpec(channels=32, width=14, height=14)
    return SpatialAttentionMaskHead(shape, num_classes=num_classes, conv_dims=[16, 16])


def test_one_class_of_the_mask_logits_is_the_same_alone():
    head = mask_head()
    x, classes = torch.randn(5, 32, 14, 14), torch.tensor([0, 2, 1, 1, 0])
    with torch.no_grad():
        every = head.layers(x)
        one = head.class_logits(x, classes)
    assert one.shape == (5, 28, 28)
    torch.testing.assert_close(one, every[torch.arange(5), classes])


def test_no_mask_logits_are_made_of_other_classes(largest_float):
    head = mask_head(num_classes=1000)
    with torch.no_grad(), largest_float() as seen:
        head.class_logits(torch.randn(5, 32, 14, 14), torch.arange(5))
    assert seen.bytes < 5 * 1000 * 28 * 28 * 4 / 10
