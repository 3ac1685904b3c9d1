"""Boxes and masks of YOLACT in the output frame, and the detector's options."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from solo_d2.layers.masks import upsample_to_binary
from solo_d2.modeling.yolact.inference import YOLACTDetector, output_boxes, pixel_windows


def test_boxes_are_clipped_at_one_end_each_and_swapped_and_truncated():
    boxes = torch.tensor([[-5.0, 20.4, 30.9, 10.2], [80.0, 5.0, 90.0, 8.0]])
    ours = output_boxes(boxes, (40, 60), (40, 60), rounding="int")
    assert ours.tolist() == [[0, 10, 30, 20], [80, 5, 60, 8]]
    doubled = output_boxes(boxes, (40, 60), (80, 120), rounding="float")
    torch.testing.assert_close(doubled[0], torch.tensor([0.0, 20.4, 61.8, 40.8]))


@given(st.integers(0, 10**6), st.booleans(), st.integers(1, 40), st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_masks_are_resized_inside_of_their_windows_only(seed, padded, height, width):
    g = torch.Generator().manual_seed(seed)
    soft = torch.rand(5, 8, 12, generator=g)
    sizes = {
        "padded_size": (32, 48),
        "image_size": (20, 37) if padded else (32, 48),
        "output_size": (height, width),
    }
    corners = torch.rand(5, 2, 2, generator=g) * 1.4 - 0.2
    boxes = (corners * torch.tensor([width, height])).sort(dim=1).values.flatten(1)
    windows = pixel_windows(boxes)
    inside = torch.zeros(5, height, width, dtype=torch.bool)
    for mask, (x1, y1, x2, y2) in zip(inside, boxes.tolist()):
        rows, columns = torch.arange(height) + 0.5, torch.arange(width) + 0.5
        mask |= ((y1 <= rows) & (rows < y2))[:, None] & ((x1 <= columns) & (columns < x2))
    for direct, precision in ((False, "highest"), (True, "highest"), (True, "high")):
        with pytest.MonkeyPatch.context() as patch:  # with "high" as on a GPU
            patch.setattr(torch, "get_float32_matmul_precision", lambda p=precision: p)
            options = {"threshold": 0.5, "direct": direct, **sizes}
            whole = upsample_to_binary(soft, **options)
            within = upsample_to_binary(soft, windows=windows, **options)
        # sums of the same numbers in another order
        assert ((whole & inside) ^ within).sum() <= 1


def test_direct_resize_of_a_padded_map_samples_where_the_image_is():
    soft = torch.linspace(0, 1, 12).expand(1, 8, 12)
    options = {"padded_size": (32, 48), "output_size": (50, 74), "threshold": 0.4, "direct": True}
    mask = upsample_to_binary(soft, image_size=(25, 37), **options)
    # column c shows input column (c + 0.5) / 2, which is map column that / 4 - 0.5, of value / 11
    values = ((torch.arange(74) + 0.5) / 8 - 0.5).clamp(0, 11) / 11
    assert torch.equal(mask[0, 0], values > 0.4)


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("nms_type", "soft", "fast, cross_class, traditional"),
        ("crop", "input", "output, prototype, none"),
        ("box_rounding", "ceil", "int, float"),
        ("top_k", 0, "at least 1"),
        ("max_detections", 0, "at least 1"),
    ],
)
def test_an_unsupported_value_is_named_with_the_allowed_ones(name, value, allowed):
    with pytest.raises(ValueError, match=f"{name} must be .*{allowed}, not {value!r}"):
        YOLACTDetector(**{name: value})
