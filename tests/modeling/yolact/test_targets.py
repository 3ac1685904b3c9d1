"""Anchors of YOLACT, the box codec, matching, mask targets and losses as functions."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from solo_d2.layers.boxes import box_ious
from solo_d2.modeling.yolact import losses
from solo_d2.modeling.yolact.anchors import decode, encode, level_scales, make_priors, to_corners
from solo_d2.modeling.yolact.protonet import inside_boxes
from solo_d2.modeling.yolact.targets import match, own_priors, reduce_masks, semantic_target


def grid_of_priors(size=(64, 96), square=False) -> torch.Tensor:
    return make_priors(
        [(8, 12), (4, 6)],
        size,
        scales=level_scales([12.0, 24.0], 1),
        aspect_ratios=[1.0, 0.5, 2.0],
        square=square,
    )


def random_boxes(seed: int, n: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    center, size = torch.rand(n, 2, generator=g), torch.rand(n, 2, generator=g) * 0.5 + 0.01
    return to_corners(torch.cat([center, size], dim=1))


def test_priors_are_in_the_order_level_row_column_scale_ratio():
    priors = make_priors(
        [(2, 3), (1, 1)],
        (40, 60),
        scales=[[8.0, 16.0], [32.0, 40.0]],
        aspect_ratios=[1.0, 4.0],
        square=False,
    )
    pixels = priors * 60
    assert len(priors) == (2 * 3 + 1) * 2 * 2
    first = [[10, 10, 8, 8], [10, 10, 16, 4], [10, 10, 16, 16], [10, 10, 32, 8], [30, 10, 8, 8]]
    torch.testing.assert_close(pixels[:5], torch.tensor(first).float())
    torch.testing.assert_close(pixels[12, :2], torch.tensor([10.0, 30.0]))
    torch.testing.assert_close(pixels[24], torch.tensor([30.0, 20, 32, 32]))


def test_scales_of_an_octave_end_below_the_next_level():
    assert level_scales([24, 48], 1) == [[24], [48]]
    (scales,) = level_scales([24], 3)
    assert scales == pytest.approx([24, 24 * 2 ** (1 / 3), 24 * 2 ** (2 / 3)])


def test_square_anchors_are_as_high_as_wide():
    priors, true = grid_of_priors(square=True), grid_of_priors()
    assert torch.equal(priors[:, 2], priors[:, 3])
    assert torch.equal(priors[:, :3], true[:, :3])
    assert not torch.equal(true[:, 2], true[:, 3])


def test_anchors_keep_their_size_in_pixels_whatever_the_shape_of_the_input():
    wide = grid_of_priors((64, 96)) * 96
    long = grid_of_priors((128, 96)) * 128
    torch.testing.assert_close(wide[:, 2:], long[:, 2:])
    torch.testing.assert_close(wide[:, 0], long[:, 0])
    torch.testing.assert_close(wide[:, 1] * 2, long[:, 1])


@given(st.integers(0, 10**6), st.integers(0, 20))
@settings(max_examples=40, deadline=None)
def test_decoding_inverts_encoding(seed, n):
    boxes = random_boxes(seed, n)
    priors = grid_of_priors()[torch.arange(0, 288, 13)[:n]]
    torch.testing.assert_close(decode(encode(boxes, priors), priors), boxes, rtol=0, atol=1e-5)


def test_a_prior_itself_is_no_offset_and_diverged_offsets_give_finite_boxes():
    priors = grid_of_priors()
    zero = encode(to_corners(priors), priors)
    torch.testing.assert_close(zero, torch.zeros_like(zero), rtol=0, atol=1e-4)
    assert decode(torch.full((1, 4), 1e4), priors[:1]).isfinite().all()


def literal_own_priors(ious: torch.Tensor) -> list[int]:
    """One object after the other, as in the published code."""
    ious, own = ious.clone(), [-1] * len(ious)
    for _ in range(len(ious)):
        value, prior = ious.max(dim=1)
        if value.max() < 0:
            break
        j = int(value.argmax())
        own[j] = int(prior[j])
        ious[:, own[j]] = -1
        ious[j] = -1
    return own


@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(1, 40), st.sampled_from([2, 5, 1000]))
@settings(max_examples=150, deadline=None)
def test_own_priors_are_those_of_the_loop_over_objects(seed, n, p, steps):
    g = torch.Generator().manual_seed(seed)
    # few steps: many ties and many zeros
    ious = torch.randint(0, steps, (n, p), generator=g) / steps
    own = own_priors(ious)
    assert own.tolist() == literal_own_priors(ious)
    served = own[own >= 0].tolist()
    assert len(set(served)) == len(served) == min(n, p)


@given(st.integers(0, 10**6), st.integers(1, 12))
@settings(max_examples=50, deadline=None)
def test_every_object_has_a_prior_and_labels_follow_the_iou(seed, n):
    boxes, priors = random_boxes(seed, n), grid_of_priors()
    classes = torch.arange(n) % 5
    labels, objects = match(boxes, classes, torch.zeros(0, 4), priors)
    positive = labels > 0
    assert set(objects[positive].tolist()) == set(range(n))
    assert torch.equal(labels[positive], classes[objects[positive]] + 1)
    ious = box_ious(boxes, to_corners(priors))
    best = ious.amax(dim=0)
    assert (labels[best >= 0.5] > 0).all()
    forced = positive & (best < 0.5)
    assert int(forced.sum()) <= n
    assert (labels[(best < 0.4) & ~forced] == 0).all()
    assert (labels[(best >= 0.4) & (best < 0.5) & ~forced] == -1).all()
    # where nobody was forced, an anchor goes to its best object
    plain = positive & (best >= 0.5)
    own = ious[objects, torch.arange(len(priors))]
    assert int((own[plain] < best[plain]).sum()) <= n


def test_rivals_for_one_prior_all_get_one():
    priors = grid_of_priors()
    boxes = to_corners(priors[[40, 40, 40]])
    labels, objects = match(boxes, torch.tensor([0, 1, 2]), torch.zeros(0, 4), priors)
    assert set(labels[labels > 0].tolist()) == {1, 2, 3}
    assert objects[40] == 0


def test_more_objects_than_anchors_are_matched_as_far_as_anchors_go():
    priors = grid_of_priors()[:2]
    labels, objects = match(random_boxes(1, 5), torch.arange(5), torch.zeros(0, 4), priors)
    assert (labels > 0).all()
    assert len(set(objects.tolist())) == 2


def test_without_objects_all_is_background_but_in_crowds():
    priors = grid_of_priors()
    none, no_classes = torch.zeros(0, 4), torch.zeros(0, dtype=torch.long)
    labels, _ = match(none, no_classes, none, priors)
    assert (labels == 0).all()
    crowd = torch.tensor([[0.0, 0.0, 0.5, 0.7]])
    labels, _ = match(none, no_classes, crowd, priors)
    corners = to_corners(priors)
    within = ((corners[:, :2] >= crowd[0, :2]) & (corners[:, 2:] <= crowd[0, 2:])).all(dim=1)
    assert within.any() and (labels[within] == -1).all()
    beside = corners[:, 0] >= 0.5
    assert beside.any() and (labels[beside] == 0).all()
    assert (match(none, no_classes, crowd, priors, crowd_threshold=1.0).labels == 0).all()


def test_crowds_leave_positives_alone():
    priors = grid_of_priors()
    boxes, classes = random_boxes(3, 4), torch.arange(4)
    everything = torch.tensor([[-1.0, -1.0, 2.0, 2.0]])
    before, objects = match(boxes, classes, torch.zeros(0, 4), priors)
    after, objects_after = match(boxes, classes, everything, priors)
    assert torch.equal(before > 0, after > 0)
    assert torch.equal(objects, objects_after)
    assert (after[before <= 0] == -1).all()


def test_masks_are_shrunk_without_antialiasing_and_more_than_half_is_set():
    masks = torch.zeros(2, 8, 8, dtype=torch.bool)
    masks[0, :4] = True
    masks[1, 1, 1] = True  # of the four pixels under a sample only one
    small = reduce_masks(masks, (4, 4))
    assert small[0].tolist() == [[True] * 4] * 2 + [[False] * 4] * 2
    assert not small[1].any()
    assert reduce_masks(masks[:0], (4, 4)).shape == (0, 4, 4)


def test_semantic_target_is_the_union_of_each_class():
    masks = torch.zeros(3, 2, 3, dtype=torch.bool)
    masks[0, 0, 0] = masks[1, 0, 0] = masks[1, 1, 2] = masks[2, 1, 1] = True
    target = semantic_target(masks, torch.tensor([2, 2, 0]), 4)
    assert target.shape == (4, 2, 3)
    assert target[2].tolist() == [[1, 0, 0], [0, 0, 1]]
    assert target[0].tolist() == [[0, 0, 0], [0, 1, 0]]
    assert not target[1].any() and not target[3].any()
    assert not semantic_target(masks[:0], torch.zeros(0, dtype=torch.long), 4).any()


def test_crop_keeps_columns_by_their_index_with_padding_at_either_end():
    boxes = torch.tensor([[2.5, 1.0, 4.0, 3.0], [4.0, 3.0, 2.5, 1.0]])
    inside = inside_boxes(boxes, (6, 8), padding=1.0)
    # columns c with 1.5 <= c < 5, rows with 0 <= r < 4
    assert inside[0].any(dim=0).nonzero()[:, 0].tolist() == [2, 3, 4]
    assert inside[0].any(dim=1).nonzero()[:, 0].tolist() == [0, 1, 2, 3]
    assert torch.equal(inside[0], inside[1])


def test_hard_negatives_are_three_per_positive_of_the_same_image_and_no_ignored_one():
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 40, 4, generator=g)
    labels = torch.zeros(3, 40, dtype=torch.long)
    labels[0, :3], labels[0, 3:20] = 1, -1
    labels[2, :15] = 2
    hard = losses.hard_negatives(logits, labels, 3)
    assert hard.sum(dim=1).tolist() == [9, 0, 25]  # image 2 has no more than 25
    background = logits.log_softmax(dim=2)[:, :, 0]
    chosen, others = background[0][hard[0]], background[0][(labels[0] == 0) & ~hard[0]]
    assert chosen.max() <= others.min()
    assert (labels[hard] == 0).all()


def test_class_loss_is_a_sum_over_positives_and_hard_negatives():
    logits = torch.zeros(1, 10, 3, requires_grad=True)
    labels = torch.tensor([[1, 2, -1, 0, 0, 0, 0, 0, 0, 0]])
    loss = losses.class_loss(logits, labels, 3)
    assert loss.item() == pytest.approx((2 + 6) * math.log(3), rel=1e-6)
    loss.backward()
    assert not logits.grad[0, 2].any()


def test_mask_loss_of_cropped_away_pixels_costs_100_each_and_has_no_gradient():
    soft = torch.full((1, 2, 2), 0.5, requires_grad=True)
    crop = torch.tensor([[[1.0, 1.0], [0.0, 1.0]]])
    truth = torch.ones(1, 2, 2, dtype=torch.bool)
    loss = losses.mask_loss(soft * crop, truth, torch.tensor([2.0]))
    assert loss.item() == pytest.approx((100 + 3 * math.log(2)) / 2)
    loss.backward()
    assert soft.grad[0, 1, 0] == 0 and (soft.grad[0, 0] < 0).all()


def test_semantic_loss_is_a_mean_over_pixels_and_a_sum_over_classes():
    loss = losses.semantic_loss(torch.zeros(5, 3, 4), torch.zeros(5, 3, 4))
    assert loss.item() == pytest.approx(5 * math.log(2))


def test_mask_ious_are_those_of_thresholded_masks():
    soft = torch.tensor([[[0.9, 0.6, 0.5, 0.1]], [[0.0, 0.0, 0.0, 0.0]]])
    truth = torch.tensor([[[True, False, True, False]], [[False] * 4]])
    assert losses.mask_ious(soft, truth).tolist() == pytest.approx([1 / 3, 0])


def test_losses_of_nothing_are_zero_and_connected():
    offsets = torch.zeros(0, 4, requires_grad=True)
    soft = torch.zeros(0, 6, 6, requires_grad=True)
    ious = torch.zeros(0, requires_grad=True)
    no_masks = torch.zeros(0, 6, 6, dtype=torch.bool)
    total = losses.box_loss(offsets, torch.zeros(0, 4))
    total = total + losses.mask_loss(soft, no_masks, torch.zeros(0))
    total = total + losses.mask_iou_loss(ious, torch.zeros(0))
    assert total == 0
    total.backward()
    assert all(x.grad is not None for x in (offsets, soft, ious))
