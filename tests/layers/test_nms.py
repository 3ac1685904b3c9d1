import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from solo_d2.layers.nms import mask_nms, matrix_nms, pairwise_mask_iou, point_nms


def random_detections(seed: int, n: int, classes: int = 3, size: int = 12):
    """Blobs that overlap, including identical and empty ones, by descending score."""
    g = torch.Generator().manual_seed(seed)
    masks = torch.zeros(n, size, size, dtype=torch.bool)
    for i in range(n):
        x, y, w, h = torch.randint(0, size, (4,), generator=g).tolist()
        masks[i, y : y + h, x : x + w] = True
        if i and torch.rand((), generator=g) < 0.2:
            masks[i] = masks[i - 1]
    labels = torch.randint(0, classes, (n,), generator=g)
    scores = torch.rand(n, generator=g).sort(descending=True).values
    return masks, labels, scores


def literal_matrix_nms(masks, labels, scores, kernel, sigma):
    """The definition of the paper, as a double loop in Python floats."""

    def iou(i, j):
        if labels[i] != labels[j]:
            return 0.0
        intersection = (masks[i] & masks[j]).sum().item()
        union = (masks[i] | masks[j]).sum().item()
        return intersection / union if union else 0.0

    def f(x):
        return math.exp(-sigma * x * x) if kernel == "gaussian" else 1 - x

    decayed = []
    for j in range(len(scores)):
        decay = 1.0
        for i in range(j):
            compensation = max((iou(k, i) for k in range(i)), default=0.0)
            if f(compensation) > 0:
                decay = min(decay, f(iou(i, j)) / f(compensation))
        decayed.append(scores[j].item() * decay)
    return torch.tensor(decayed)


def literal_mask_nms(masks, labels, threshold):
    keep: list[int] = []
    for j in range(len(masks)):
        for i in keep:
            union = (masks[i] | masks[j]).sum().item()
            overlap = (masks[i] & masks[j]).sum().item()
            if labels[i] == labels[j] and (union == 0 or overlap / union > threshold):
                break
        else:
            keep.append(j)
    return torch.tensor([j in keep for j in range(len(masks))], dtype=torch.bool)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 25), st.sampled_from([0.5, 2.0]))
def test_gaussian_matrix_nms_equals_the_literal_double_loop(seed, n, sigma):
    masks, labels, scores = random_detections(seed, n)
    expected = literal_matrix_nms(masks, labels, scores, "gaussian", sigma)
    actual = matrix_nms(masks, labels, scores, kernel="gaussian", sigma=sigma)
    torch.testing.assert_close(actual, expected.reshape(actual.shape), atol=1e-6, rtol=1e-5)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 25))
def test_linear_matrix_nms_equals_the_literal_double_loop_but_for_duplicates(seed, n):
    masks, labels, scores = random_detections(seed, n)
    expected = literal_matrix_nms(masks, labels, scores, "linear", 0.0).reshape(n)
    actual = matrix_nms(masks, labels, scores, kernel="linear")
    regular = ~actual.isnan()
    torch.testing.assert_close(actual[regular], expected[regular], atol=1e-6, rtol=1e-5)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 25), st.sampled_from([0.3, 0.5, 0.8]))
def test_greedy_mask_nms_equals_the_literal_loop(seed, n, threshold):
    masks, labels, _ = random_detections(seed, n)
    expected = literal_mask_nms(masks, labels, threshold)
    assert torch.equal(mask_nms(masks, labels, iou_threshold=threshold), expected)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 25))
def test_matrix_nms_never_raises_a_score_and_leaves_the_best(seed, n):
    masks, labels, scores = random_detections(seed, n)
    decayed = matrix_nms(masks, labels, scores)
    assert (decayed <= scores + 1e-7).all()
    assert decayed[0] == scores[0]


def test_duplicates_get_nan_from_the_linear_kernel_or_zero_on_request():
    masks = torch.ones(3, 4, 4, dtype=torch.bool)
    labels, scores = torch.zeros(3), torch.tensor([0.9, 0.8, 0.7])
    assert matrix_nms(masks, labels, scores, kernel="linear")[2].isnan()
    finite = matrix_nms(masks, labels, scores, kernel="linear", finite=True)
    assert finite.tolist() == pytest.approx([0.9, 0, 0])


def test_an_unknown_kernel_is_named():
    masks, labels, scores = random_detections(0, 3)
    with pytest.raises(ValueError, match="'gauss'"):
        matrix_nms(masks, labels, scores, kernel="gauss")


def test_iou_counts_more_pixels_than_half_precision_can():
    masks = torch.ones(2, 300, 300, dtype=torch.bool)
    masks[1, 0, 0] = False
    expected = (90000 - 1) / 90000
    assert pairwise_mask_iou(masks)[0, 1].item() == pytest.approx(expected, abs=1e-7)


def test_point_nms_looks_up_and_left_only():
    scores = torch.tensor([[0.9, 0.5, 0.6], [0.4, 0.9, 0.1], [0.5, 0.2, 0.3]]).view(1, 1, 3, 3)
    kept = point_nms(scores)[0, 0]
    expected = torch.tensor([[0.9, 0.0, 0.6], [0.0, 0.9, 0.0], [0.5, 0.0, 0.0]])
    assert torch.equal(kept, expected)


def test_point_nms_keeps_ties_and_does_not_mix_classes_or_images():
    scores = torch.rand(2, 3, 5, 5)
    joint = point_nms(scores)
    for n in range(2):
        for c in range(3):
            assert torch.equal(joint[n, c], point_nms(scores[n : n + 1, c : c + 1])[0, 0])
    flat = torch.full((1, 1, 4, 4), 0.5)
    assert torch.equal(point_nms(flat), flat)
