"""Anchors of YOLACT and the encoding of boxes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from solo_d2.modeling.yolact.anchors import AnchorGenerator, decode, encode, to_corners

LEVELS = [(8, 12), (4, 6)]


def test_anchors_are_in_the_order_level_row_column_scale_ratio():
    generator = AnchorGenerator(sizes=[8, 32], per_octave=2, aspect_ratios=[1.0, 4.0], square=False)
    assert (generator.num_levels, generator.num_anchors) == (2, 4)
    anchors = generator([(2, 3), (1, 1)], (40, 60))
    assert len(anchors) == (2 * 3 + 1) * 4
    pixels, next_scale = anchors * 60, 2**0.5
    first = [[10, 10, 8, 8], [10, 10, 16, 4]]
    second = [[10, 10, 8 * next_scale, 8 * next_scale], [10, 10, 16 * next_scale, 4 * next_scale]]
    torch.testing.assert_close(pixels[:4], torch.tensor(first + second).float())
    torch.testing.assert_close(pixels[4], torch.tensor([30.0, 10, 8, 8]))
    torch.testing.assert_close(pixels[12, :2], torch.tensor([10.0, 30.0]))
    torch.testing.assert_close(pixels[24], torch.tensor([30.0, 20, 32, 32]))


def test_scales_of_an_octave_end_below_the_next_level():
    (scales,) = AnchorGenerator(sizes=[24], per_octave=3, aspect_ratios=[1.0]).scales
    assert scales == pytest.approx([24, 24 * 2 ** (1 / 3), 24 * 2 ** (2 / 3)])


def test_square_anchors_are_as_high_as_wide(anchors):
    generator = AnchorGenerator(sizes=[12.0, 24.0], aspect_ratios=[1.0, 0.5, 2.0], square=True)
    square = generator(LEVELS, (64, 96))
    assert torch.equal(square[:, 2], square[:, 3])
    assert torch.equal(square[:, :3], anchors[:, :3])
    assert not torch.equal(anchors[:, 2], anchors[:, 3])


def test_anchors_keep_their_size_in_pixels_whatever_the_shape_of_the_input(generator):
    wide = generator(LEVELS, (64, 96)) * 96
    long = generator(LEVELS, (128, 96)) * 128
    torch.testing.assert_close(wide[:, 2:], long[:, 2:])
    torch.testing.assert_close(wide[:, 0], long[:, 0])
    torch.testing.assert_close(wide[:, 1] * 2, long[:, 1])


def test_equal_sizes_share_one_table_that_training_can_use_after_inference():
    generator = AnchorGenerator(sizes=[7.0, 14.0], aspect_ratios=[1.0])
    with torch.inference_mode():
        first = generator(LEVELS, (64, 96))
    assert generator(LEVELS, (64, 96)) is first
    assert generator(LEVELS, (64, 92)) is not first
    scale = torch.ones(4, requires_grad=True)
    (first * scale).sum().backward()
    torch.testing.assert_close(scale.grad, first.sum(dim=0))


def test_tracing_records_anchors_rather_than_filling_the_table():
    class Traced(nn.Module):
        def forward(self, x):
            size = tuple(x.shape[-2:])
            return generator([size], size, x.device) + x.sum()

    generator = AnchorGenerator(sizes=[5.0], aspect_ratios=[1.0])
    x = torch.zeros(1, 1, 3, 4)
    traced = torch.jit.trace(Traced(), x)
    torch.testing.assert_close(traced(x), generator([(3, 4)], (3, 4)))


@pytest.mark.parametrize(
    ("name", "value"),
    [("sizes", []), ("sizes", [0]), ("aspect_ratios", [1.0, -1.0]), ("per_octave", 0)],
)
def test_an_unsupported_value_is_named(name, value):
    options = {"sizes": [8.0], "aspect_ratios": [1.0], name: value}
    with pytest.raises(ValueError, match=f"{name} must be"):
        AnchorGenerator(**options)


@given(st.integers(0, 10**6), st.integers(0, 20))
@settings(max_examples=40, deadline=None)
def test_decoding_inverts_encoding(anchors, random_boxes, seed, n):
    boxes, chosen = random_boxes(seed, n), anchors[torch.arange(0, 288, 13)[:n]]
    torch.testing.assert_close(decode(encode(boxes, chosen), chosen), boxes, rtol=0, atol=1e-5)


def test_an_anchor_itself_is_no_offset_and_diverged_offsets_give_finite_boxes(anchors):
    zero = encode(to_corners(anchors), anchors)
    torch.testing.assert_close(zero, torch.zeros_like(zero), rtol=0, atol=1e-4)
    assert decode(torch.full((1, 4), 1e4), anchors[:1]).isfinite().all()
