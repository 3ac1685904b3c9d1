"""Training targets of AdaptIS: points, painted labels, targets of proposals."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from solo_d2.modeling.adaptis.targets import (
    PointSampler,
    dual_targets,
    score_targets,
    semantic_labels,
    targets_of_points,
    top20_targets,
    topmost,
)
from solo_d2.modeling.segmentor import GroundTruth

NOTHING = torch.zeros((0, 12, 16), dtype=torch.bool)


def boxes(*corners: tuple[int, int, int, int]) -> torch.Tensor:
    """A mask (12, 16) for each (top, left, bottom, right)."""
    masks = torch.zeros((len(corners), 12, 16), dtype=torch.bool)
    for mask, (top, left, bottom, right) in zip(masks, corners):
        mask[top:bottom, left:right] = True
    return masks


LARGE, SMALL, APART = (0, 0, 8, 8), (2, 2, 5, 5), (8, 10, 12, 16)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---- painting


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_smaller_masks_lie_on_larger_ones_in_any_order(order):
    masks = boxes(LARGE, SMALL)[list(order)]
    owner = topmost(masks)
    assert owner[3, 3] == order.index(1) and owner[0, 0] == order.index(0) and owner[11, 15] == -1


def test_of_equally_large_masks_the_last_is_seen():
    assert topmost(boxes(SMALL, SMALL, SMALL))[3, 3] == 2


def ground_truth(masks: torch.Tensor, classes: list[int], crowds: torch.Tensor) -> GroundTruth:
    """Of an image of 12 x 14 pixels in a batch of 12 x 16."""
    return GroundTruth(
        boxes=torch.zeros(len(masks), 4),
        classes=torch.tensor(classes, dtype=torch.long),
        masks=masks,
        image_size=(12, 14),
        crowd_boxes=torch.zeros(len(crowds), 4),
        crowd_masks=crowds,
    )


def test_semantic_labels_are_painted_from_instances_and_crowds_are_ignored():
    gt = ground_truth(boxes(LARGE, SMALL), [0, 2], boxes((6, 0, 12, 16)))
    labels = semantic_labels(gt, None, num_classes=4)
    assert labels[7, 7] == 1 and labels[3, 3] == 3  # an object in a crowd region is an object
    assert labels[0, 13] == 0 and labels[11, 13] == -1 and (labels[:, 14:] == -1).all()
    without = semantic_labels(ground_truth(NOTHING, [], NOTHING), None, num_classes=4)
    assert (without[:, :14] == 0).all()


def test_semantic_labels_that_are_no_class_are_ignored():
    given = torch.full((12, 14), 3)
    given[0, :3] = torch.tensor([255, -1, 4])
    labels = semantic_labels(ground_truth(boxes(LARGE), [0], NOTHING), given, num_classes=4)
    assert labels[0, :4].tolist() == [-1, -1, -1, 3] and (labels[:, 14:] == -1).all()


# ---- points


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.booleans(), st.integers(1, 9))
def test_points_lie_on_visible_pixels_of_their_targets(seed, from_one_object, num_points):
    masks = boxes(LARGE, SMALL, APART)
    sampler = PointSampler(num_points, from_one_object=from_one_object)
    points, targets = sampler(masks, NOTHING, generator=seeded(seed))
    assert points.shape == (num_points, 2) and targets.shape == (num_points, 12, 16)
    owner = topmost(masks)
    for (row, column), target in zip(points.long().tolist(), targets):
        assert torch.equal(target, masks[owner[row, column]].to(torch.int8))
    if from_one_object:
        assert (targets == targets[0]).all()


def test_objects_are_drawn_uniformly_and_so_are_their_pixels():
    masks = boxes(LARGE, SMALL, APART)
    points, targets = PointSampler(3000)(masks, NOTHING, generator=seeded(0))
    small = (targets == masks[1].to(torch.int8)).flatten(1).all(dim=1)
    assert float(small.float().mean()) == pytest.approx(1 / 3, abs=0.04)
    counts = (points[small, 0] * 16 + points[small, 1]).long().bincount()
    assert (counts > 0).sum() == 9
    assert counts.max() < 1.5 * counts[counts > 0].min()


def test_a_seed_tells_the_points():
    a, b = (PointSampler(5)(boxes(LARGE, APART), NOTHING, generator=seeded(3)) for _ in range(2))
    assert torch.equal(a[0], b[0])


def test_without_a_visible_object_all_is_ignored():
    hidden = torch.zeros((2, 12, 16), dtype=torch.bool)
    for masks in (NOTHING, hidden):
        points, targets = PointSampler(4, ignored_prob=0.5)(masks, NOTHING)
        assert not points.any() and (targets == -1).all()


def test_a_hidden_object_is_never_drawn():
    masks = boxes((2, 2, 5, 5), (2, 2, 3, 5), (3, 2, 5, 5))  # two halves cover the first
    _, targets = PointSampler(50)(masks, NOTHING, generator=seeded(0))
    assert not (targets == masks[0].to(torch.int8)).flatten(1).all(dim=1).any()


def test_small_objects_and_crowds_are_drawn_only_to_be_ignored():
    masks, crowd = boxes(LARGE, SMALL), boxes(APART)
    _, targets = PointSampler(50, min_area=10)(masks, crowd, generator=seeded(0))
    assert (targets == masks[0].to(torch.int8)).all()
    sampler = PointSampler(50, min_area=10, ignored_prob=0.5)
    points, targets = sampler(masks, crowd, generator=seeded(0))
    ignoring = (targets == -1).flatten(1).any(dim=1)
    assert 10 < ignoring.sum() < 40
    # the small one has fewer than ten pixels, too few even then
    assert (targets[ignoring] == -crowd[0].to(torch.int8)).all()
    rows, columns = points[ignoring].long().unbind(1)
    assert crowd[0, rows, columns].all()
    _, targets = PointSampler(50, ignored_prob=1.0)(masks, NOTHING, generator=seeded(0))
    assert (targets >= 0).all()


def test_given_points_get_what_lies_on_top_under_them():
    masks = boxes(LARGE, SMALL)
    points = torch.tensor([[3.0, 3.0], [0.0, 0.0], [11.0, 15.4], [0.4, 6.6]])
    _, targets = targets_of_points(points, masks)
    assert torch.equal(targets[0], masks[1].to(torch.int8))
    assert torch.equal(targets[1], masks[0].to(torch.int8))
    assert (targets[2] == -1).all()
    assert torch.equal(targets[3], masks[0].to(torch.int8))


# ---- targets of the second stage

IOU = torch.tensor([[0.9, 0.8, 0.1, 0.5, 0.6, 0.7, 0.65, 0.2, 0.3, 0.4]], dtype=torch.float64)


def test_the_best_fifth_is_positive():
    assert top20_targets(IOU).tolist() == [[1, 1, 0, 0, 0, 0, 0, 0, 0, 0]]
    assert top20_targets(IOU[:, :6]).sum() == 2  # rounded up
    assert top20_targets(IOU[:, :1]).tolist() == [[1]]


def test_the_worst_half_is_negative_and_the_middle_ignored():
    targets = dual_targets(IOU)[0]
    assert targets[[0, 1]].tolist() == [1, 1]
    assert (targets == 0).nonzero()[:, 0].tolist() == [2, 3, 7, 8, 9]
    assert targets[[4, 5, 6]].tolist() == [-1, -1, -1]


def test_equal_points_are_ranked_in_their_order():
    assert top20_targets(torch.full((1, 10), 0.5).double())[0].nonzero()[:, 0].tolist() == [0, 1]


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10**6), st.integers(1, 12))
def test_graded_targets_follow_the_rule_point_by_point(seed, n):
    rng = np.random.default_rng(seed)
    iou, quality = rng.random(n) ** rng.integers(1, 5), rng.random(n)
    score = iou * quality
    if iou.max() - iou.min() > 0.1:
        bar = 0.95 * np.percentile(score, 30)
    else:
        bar = 0.99 * score.min()
    good = score > bar
    expected = good.astype(float)
    if good.any() and np.ptp(score[good]) > 1e-3:
        low, high = score[good].min(), score[good].max()
        expected[good] = 0.7 + 0.3 * (score[good] - low) / (high - low)
    if iou.max() < 1e-5:
        expected[:] = -1
    targets = score_targets(torch.tensor(iou)[None], torch.tensor(quality)[None])[0]
    np.testing.assert_allclose(targets, expected, atol=1e-12)


@pytest.mark.parametrize("rule", [score_targets, top20_targets, dual_targets])
def test_an_object_whose_masks_tell_nothing_has_no_targets(rule):
    iou = torch.tensor([[0.0, 0.0, 0.0], [0.5, -1.0, 0.2], [0.5, 0.4, 0.2]]).double()
    targets = rule(iou, torch.full_like(iou, 0.5))
    assert (targets[:2] == -1).all() and (targets[2] >= 0).any()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_points": 0}, "num_points must be at least 1, not 0"),
        ({"ignored_prob": 1.5}, "ignored_prob must be from 0 to 1, not 1.5"),
    ],
)
def test_a_wrong_option_of_the_sampler_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        PointSampler(**options)
