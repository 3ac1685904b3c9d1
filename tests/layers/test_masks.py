import numpy as np
import pytest
import torch
from detectron2.structures import BitMasks
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from solo_d2.layers import masks as mask_ops
from solo_d2.layers.masks import (
    downsample_masks,
    downsample_unpadded_masks,
    mass_centers,
    tight_boxes,
    upsample_to_binary,
)


def random_masks(seed: int, n: int, h: int, w: int) -> torch.Tensor:
    """Sparse, dense, empty and single-pixel masks."""
    g = torch.Generator().manual_seed(seed)
    density = torch.rand(n, 1, 1, generator=g) ** 3
    masks = torch.rand(n, h, w, generator=g) < density
    if n:
        masks[0] = False
    return masks


@given(st.integers(0, 10**6), st.integers(0, 6), st.integers(1, 20), st.integers(1, 20))
@settings(max_examples=60, deadline=None)
def test_tight_boxes_are_those_of_detectron2(seed, n, h, w):
    masks = random_masks(seed, n, h, w)
    expected = BitMasks(masks).get_bounding_boxes().tensor
    assert torch.equal(tight_boxes(masks), expected)


@given(st.integers(0, 10**6), st.integers(0, 6), st.integers(1, 20), st.integers(1, 20))
@settings(max_examples=60, deadline=None)
def test_mass_centers_are_the_mean_indices(seed, n, h, w):
    masks = random_masks(seed, n, h, w)
    centers, areas = mass_centers(masks)
    for mask, center, area in zip(masks.numpy(), centers, areas):
        rows, columns = np.nonzero(mask)
        assert area == len(rows)
        expected = (columns.mean(), rows.mean()) if len(rows) else (0, 0)
        assert center.tolist() == pytest.approx(expected, rel=1e-6)


@given(st.integers(0, 10**6), st.sampled_from([2, 4, 8, 16]))
@settings(max_examples=30, deadline=None)
def test_reducing_is_a_bilinear_resize_and_a_test_for_one_half(seed, stride):
    masks = random_masks(seed, 3, 2 * stride, 3 * stride)
    resized = F.interpolate(masks[None].double(), scale_factor=1 / stride, mode="bilinear")[0]
    assert torch.equal(downsample_masks(masks, stride), resized >= 0.5)


def test_both_ways_of_reducing_agree_where_the_size_divides():
    masks = random_masks(3, 5, 32, 48)
    assert torch.equal(
        downsample_unpadded_masks(masks, 4, (32, 48), (32, 48)), downsample_masks(masks, 4)
    )


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (30, 46)])
def test_unpadded_reduction_is_the_resize_of_opencv(size):
    cv2 = pytest.importorskip("cv2")
    h, w = size
    masks = torch.zeros(4, 32, 48, dtype=torch.bool)
    masks[:, :h, :w] = random_masks(7, 4, h, w)
    rows, columns = int(h / 4 + 0.5), int(w / 4 + 0.5)
    expected = torch.zeros(4, 8, 12, dtype=torch.bool)
    if rows and columns:
        for i, mask in enumerate(masks[:, :h, :w].numpy().astype(np.uint8)):
            expected[i, :rows, :columns] = torch.from_numpy(cv2.resize(mask, (columns, rows)) > 0)
    assert torch.equal(downsample_unpadded_masks(masks, 4, size, (32, 48)), expected)


def literal_upsampling(soft, padded_size, image_size, output_size, threshold):
    """Two resizes of the whole stack, as in the papers' code."""
    h, w = image_size
    soft = F.interpolate(soft[:, None], size=padded_size, mode="bilinear")[:, :, :h, :w]
    return F.interpolate(soft, size=output_size, mode="bilinear")[:, 0] > threshold


@given(
    st.integers(0, 10**6),
    st.integers(0, 4),
    st.tuples(st.integers(1, 32), st.integers(1, 48)),
    st.tuples(st.integers(1, 70), st.integers(1, 70)),
)
@settings(max_examples=80, deadline=None)
def test_upsampling_equals_the_literal_two_resizes(seed, n, image_size, output_size):
    # blobs: upsampled noise, so that regions smaller than the map occur
    g = torch.Generator().manual_seed(seed)
    soft = torch.rand(n, 1, 3, 4, generator=g) ** 2
    soft = F.interpolate(soft, size=(8, 12), mode="bilinear")[:, 0]
    arguments = ((32, 48), image_size, output_size, 0.5)
    expected = literal_upsampling(soft, *arguments)
    actual = upsample_to_binary(
        soft, padded_size=(32, 48), image_size=image_size, output_size=output_size, threshold=0.5
    )
    assert actual.shape == (n, *output_size)
    assert actual.dtype == torch.bool
    # the two differ in the order of float32 additions: values at 0.5 may fall on either side
    near = (literal_soft(soft, *arguments[:3]) - 0.5).abs() < 1e-5
    assert torch.equal(actual | near, expected | near)


def literal_soft(soft, padded_size, image_size, output_size):
    h, w = image_size
    soft = F.interpolate(soft[:, None], size=padded_size, mode="bilinear")[:, :, :h, :w]
    return F.interpolate(soft, size=output_size, mode="bilinear")[:, 0]


@pytest.fixture
def low_precision():
    """As on a GPU with TF32: products of matrices may be rounded."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("direct", [False, True])
def test_upsampling_keeps_its_edges_where_products_are_rounded(low_precision, direct, monkeypatch):
    soft = torch.rand(7, 8, 8, generator=torch.Generator().manual_seed(0))
    sizes = ((32, 32), (30, 31), (60, 50))
    options = dict(zip(("padded_size", "image_size", "output_size"), sizes), direct=direct)
    windows = torch.tensor([[3, 5, 40, 57]]).repeat(7, 1)
    rounded = upsample_to_binary(soft, threshold=0.5, **options)
    inside = upsample_to_binary(soft, threshold=0.5, windows=windows, **options)
    for bytes_per_chunk in (1, 3 * 60 * 50 * 4 * 3):
        monkeypatch.setattr(mask_ops, "CHUNK_BYTES", bytes_per_chunk)
        assert torch.equal(upsample_to_binary(soft, threshold=0.5, **options), rounded)
        chunked = upsample_to_binary(soft, threshold=0.5, windows=windows, **options)
        assert torch.equal(chunked, inside)
    torch.set_float32_matmul_precision("highest")
    exact = upsample_to_binary(soft, threshold=0.5, **options)
    assert exact.any() and (exact ^ rounded).float().mean() < 1e-4
    assert torch.equal(upsample_to_binary(soft, threshold=0.5, windows=windows, **options), inside)
    window = torch.zeros(60, 50, dtype=torch.bool)
    window[5:57, 3:40] = True
    assert torch.equal(inside, rounded & window)
    if not direct:
        assert (rounded ^ literal_upsampling(soft, *sizes, 0.5)).float().mean() < 1e-4


@pytest.mark.parametrize("free, cached, expected", [(4000, 0, 25), (0, 2000, 12), (0, 0, 1)])
def test_chunks_take_a_quarter_of_a_gpus_free_memory(monkeypatch, free, cached, expected):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 10**6))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: cached + 7)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 7)
    assert mask_ops.chunk_length(10, torch.device("cuda")) == expected
    assert mask_ops.chunk_length(10, torch.device("cpu")) == mask_ops.CHUNK_BYTES // 40


def test_upsampling_makes_no_float_tensor_that_grows_with_masks_times_image(
    monkeypatch, largest_float
):
    monkeypatch.setattr(mask_ops, "CHUNK_BYTES", 100_000)
    largest = {}
    for n in (4, 40):
        soft = torch.rand(n, 16, 16)
        with largest_float() as mode:
            out = upsample_to_binary(
                soft,
                padded_size=(64, 64),
                image_size=(64, 60),
                output_size=(128, 120),
                threshold=0.5,
            )
        assert out.shape == (n, 128, 120)
        largest[n] = mode.bytes
    assert largest[4] == largest[40] <= 128 * 120 * 4
