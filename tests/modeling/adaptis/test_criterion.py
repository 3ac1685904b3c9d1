"""The losses of AdaptIS and its adaptive threshold."""

import pytest
import torch

from solo_d2.modeling.adaptis.criterion import (
    AdaptiveThreshold,
    InstanceCriterion,
    ProposalCriterion,
    mask_iou,
    mask_quality,
    normalized_focal_loss,
    normalized_focal_loss_softmax,
    proposal_loss,
)


def test_all_ignored_costs_nothing_and_is_connected():
    logits = torch.randn(2, 1, 4, 4, requires_grad=True)
    loss = normalized_focal_loss(logits, -torch.ones(2, 1, 4, 4)).sum()
    semantic = torch.randn(1, 3, 4, 4, requires_grad=True)
    loss = loss + normalized_focal_loss_softmax(semantic, -torch.ones(1, 4, 4).long()).sum()
    proposals = torch.randn(5, requires_grad=True)
    loss = loss + proposal_loss(proposals, -torch.ones(5)).sum()
    loss.backward()
    assert loss == 0
    for x in (logits, semantic, proposals):
        assert x.grad is not None and not x.grad.any()


def test_losses_are_finite_for_huge_logits_in_half_precision():
    for sign in (1, -1):
        logits = torch.full((1, 1, 4, 4), sign * 3e4).half().requires_grad_()
        for label in (0, 1):
            loss = normalized_focal_loss(logits, torch.full((1, 1, 4, 4), label))
            assert loss.dtype == torch.float32 and loss.isfinite().all()
            loss.sum().backward()
            assert logits.grad.isfinite().all()
        maps = torch.cat([logits.detach(), -logits.detach()], dim=1)
        loss = normalized_focal_loss_softmax(maps, torch.zeros(1, 4, 4).long())
        assert loss.dtype == torch.float32 and loss.isfinite().all()


def test_the_loss_of_a_padded_image_is_that_of_the_image():
    torch.manual_seed(0)
    logits, labels = torch.randn(1, 1, 5, 6), torch.randint(0, 2, (1, 1, 5, 6))
    padded_logits, padded_labels = torch.randn(1, 1, 8, 8), torch.full((1, 1, 8, 8), -1)
    padded_logits[..., :5, :6], padded_labels[..., :5, :6] = logits, labels
    torch.testing.assert_close(
        normalized_focal_loss(padded_logits, padded_labels, num_pixels=torch.tensor([30.0])),
        normalized_focal_loss(logits, labels),
    )


def test_the_threshold_climbs_where_a_higher_one_fits_better():
    probs = torch.full((1, 4, 4), 0.36)
    probs[0, :2] = 0.9
    target = torch.zeros(1, 4, 4)
    target[0, :2] = 1
    threshold = AdaptiveThreshold(0.35)
    assert float(threshold.update(probs, target)) == 1
    assert float(threshold.value) == pytest.approx(0.99 * 0.35 + 0.01 * 0.375)
    before = threshold.value.clone()
    assert float(threshold.update(probs, torch.zeros(1, 4, 4))) == 0
    assert float(threshold.update(probs, -torch.ones(1, 4, 4))) == 0
    assert threshold.value == before


def test_iou_leaves_ignored_pixels_out():
    probs = torch.ones(2, 2, 2)
    targets = torch.tensor([[[1, 0], [-1, -1]], [[-1, -1], [-1, -1]]])
    assert mask_iou(probs, targets, 0.5).tolist() == [0.5, -1]


def test_quality_is_the_mean_probability_inside():
    probs = torch.tensor([[[0.5, 0.9], [0.1, 0.3]], [[0.5, 0.9], [0.1, 0.3]]])
    targets = torch.tensor([[[1, 1], [0, 0]], [[0, 0], [0, 0]]])
    assert mask_quality(probs, targets).tolist() == pytest.approx([0.7, 0])


def test_no_map_is_made_in_double_precision(largest_float):
    """It would be 64 times slower on many GPUs."""
    probs, targets = torch.rand(3, 40, 50), torch.randint(-1, 2, (3, 40, 50))
    with largest_float() as largest:
        AdaptiveThreshold(0.35).update(probs, targets)
        mask_quality(probs, targets)
    assert largest.bytes == 4 * probs.numel()


@pytest.mark.parametrize("alpha", [0, 1, -0.5])
def test_alpha_is_a_share(alpha):
    with pytest.raises(ValueError, match="alpha must be between 0 and 1"):
        InstanceCriterion(alpha=alpha)


def test_an_unknown_rule_is_named():
    with pytest.raises(ValueError, match="targets must be one of score, top20, dual, not 'best'"):
        ProposalCriterion(targets="best")
