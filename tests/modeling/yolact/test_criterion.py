"""Losses of YOLACT as functions, and the criterion's options."""

import math

import pytest
import torch
from torch.nn import functional as F

from solo_d2.modeling.yolact.criterion import (
    YOLACTCriterion,
    box_loss,
    class_costs,
    class_loss,
    hard_negatives,
    mask_iou_loss,
    mask_ious,
    mask_loss,
    semantic_loss,
)


def test_hard_negatives_are_three_per_positive_of_the_same_image_and_no_ignored_one():
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 40, 4, generator=g)
    labels = torch.zeros(3, 40, dtype=torch.long)
    labels[0, :3], labels[0, 3:20] = 1, -1
    labels[2, :15] = 2
    hard = hard_negatives(class_costs(logits, labels), labels, 3)
    assert hard.sum(dim=1).tolist() == [9, 0, 25]  # image 2 has no more than 25
    background = logits.log_softmax(dim=2)[:, :, 0]
    chosen, others = background[0][hard[0]], background[0][(labels[0] == 0) & ~hard[0]]
    assert chosen.max() <= others.min()
    assert (labels[hard] == 0).all()


def test_class_loss_is_a_sum_over_positives_and_hard_negatives():
    logits = torch.zeros(1, 10, 3, requires_grad=True)
    labels = torch.tensor([[1, 2, -1, 0, 0, 0, 0, 0, 0, 0]])
    loss = class_loss(logits, labels, 3)
    assert loss.item() == pytest.approx((2 + 6) * math.log(3), rel=1e-6)
    loss.backward()
    assert not logits.grad[0, 2].any()


def test_mask_loss_of_cropped_away_pixels_costs_100_each_and_has_no_gradient():
    soft = torch.full((1, 2, 2), 0.5, requires_grad=True)
    crop = torch.tensor([[[1.0, 1.0], [0.0, 1.0]]])
    truth = torch.ones(1, 2, 2, dtype=torch.bool)
    loss = mask_loss(soft * crop, truth, torch.tensor([2.0]))
    assert loss.item() == pytest.approx((100 + 3 * math.log(2)) / 2)
    loss.backward()
    assert soft.grad[0, 1, 0] == 0 and (soft.grad[0, 0] < 0).all()


def test_semantic_loss_is_a_mean_over_pixels_and_a_sum_over_classes():
    loss = semantic_loss(torch.zeros(5, 3, 4), torch.zeros(5, 3, 4))
    assert loss.item() == pytest.approx(5 * math.log(2))


def test_mask_ious_are_those_of_thresholded_masks():
    soft = torch.tensor([[[0.9, 0.6, 0.5, 0.1]], [[0.0, 0.0, 0.0, 0.0]]])
    truth = torch.tensor([[[True, False, True, False]], [[False] * 4]])
    assert mask_ious(soft, truth).tolist() == pytest.approx([1 / 3, 0])


def test_losses_of_nothing_are_zero_and_connected():
    offsets = torch.zeros(0, 4, requires_grad=True)
    soft = torch.zeros(0, 6, 6, requires_grad=True)
    ious = torch.zeros(0, requires_grad=True)
    no_masks = torch.zeros(0, 6, 6, dtype=torch.bool)
    total = box_loss(offsets, torch.zeros(0, 4))
    total = total + mask_loss(soft, no_masks, torch.zeros(0))
    total = total + mask_iou_loss(ious, torch.zeros(0), torch.zeros(0, dtype=torch.bool))
    assert total == 0
    total.backward()
    assert all(x.grad is not None for x in (offsets, soft, ious))


def test_mask_loss_has_the_value_and_gradient_of_binary_cross_entropy():
    g = torch.Generator().manual_seed(0)
    logits, truth = torch.randn(3, 5, 6, generator=g) * 4, torch.rand(3, 5, 6, generator=g) > 0.5
    gradients = []
    for loss in (
        lambda soft: mask_loss(soft, truth, torch.tensor([2.0, 3.0, 4.0])),
        lambda soft: (
            F.binary_cross_entropy(soft, truth.float(), reduction="none").sum(dim=(1, 2))
            / torch.tensor([2.0, 3.0, 4.0])
        ).sum(),
    ):
        x = logits.clone().requires_grad_()
        value = loss(x.sigmoid())
        value.backward()
        gradients.append((value.detach(), x.grad))
    torch.testing.assert_close(gradients[0], gradients[1])


def test_saturated_masks_have_a_finite_loss_and_gradient():
    logits = torch.tensor([[[-200.0, -95.0, 95.0, 200.0]]], requires_grad=True)
    for truth in (torch.ones(1, 1, 4, dtype=torch.bool), torch.zeros(1, 1, 4, dtype=torch.bool)):
        loss = mask_loss(logits.sigmoid(), truth, torch.ones(1))
        assert loss <= 200
        (gradient,) = torch.autograd.grad(loss, logits)
        assert gradient.isfinite().all()


def test_losses_of_nan_are_nan_and_do_not_raise():
    nan = float("nan")
    truth = torch.ones(1, 2, 2, dtype=torch.bool)
    assert mask_loss(torch.full((1, 2, 2), nan), truth, torch.ones(1)).isnan()
    assert mask_loss(torch.full((1, 2, 2), nan), ~truth, torch.ones(1)).isnan()
    logits = torch.full((1, 8, 3), nan)
    assert class_loss(logits, torch.tensor([[1, 0, 0, 0, 0, 0, 0, 0]]), 3).isnan()
    assert box_loss(torch.full((1, 4), nan), torch.zeros(1, 4)).isnan()
    assert semantic_loss(torch.full((3, 2, 2), nan), torch.zeros(3, 2, 2)).isnan()


def test_mask_iou_loss_counts_the_chosen_ones_only():
    predicted = torch.tensor([0.5, 0.9], requires_grad=True)
    loss = mask_iou_loss(predicted, torch.tensor([0.1, 0.1]), torch.tensor([True, False]))
    assert loss.item() == pytest.approx(0.5 * 0.4**2)
    loss.backward()
    assert predicted.grad[0] != 0 and predicted.grad[1] == 0


def test_an_unsupported_value_is_named():
    with pytest.raises(ValueError, match="masks_to_train must be at least 0, not -1"):
        YOLACTCriterion(num_classes=3, masks_to_train=-1)
