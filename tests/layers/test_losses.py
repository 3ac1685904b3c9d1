import pytest
import torch
from fvcore.nn import sigmoid_focal_loss
from torch.nn import functional as F

from solo_d2.layers.losses import MASK_LOSSES, dice_loss, mask_bce_loss, mask_focal_loss


@pytest.fixture
def masks():
    """Logits of moderate size and targets, (6, 9, 11)."""
    g = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(6, 9, 11, generator=g)
    return logits.requires_grad_(), torch.rand(6, 9, 11, generator=g) > 0.5


@pytest.mark.parametrize("name", ["bce", "focal"])
def test_cross_entropies_equal_those_on_logits_and_so_do_gradients(masks, name):
    logits, targets = masks
    if name == "bce":
        expected = F.binary_cross_entropy_with_logits(logits, targets.float(), reduction="none")
    else:
        expected = sigmoid_focal_loss(logits, targets.float(), alpha=0.25, gamma=2)
    expected = expected.flatten(1).mean(1)
    loss = MASK_LOSSES[name](logits.sigmoid(), targets)
    # a probability near 1 leaves few bits for its distance from 1
    torch.testing.assert_close(loss, expected, atol=0, rtol=1e-4)
    ours, theirs = (torch.autograd.grad(x.sum(), logits)[0] for x in (loss, expected))
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-3)


def test_dice_to_check_by_eye():
    target = torch.tensor([[[1, 1], [0, 0]]], dtype=torch.bool)
    half = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]])
    # 1 - 2 * 1 / (1 + 2), except for the small constants
    assert dice_loss(half, target).item() == pytest.approx(1 / 3, abs=1e-3)
    assert dice_loss(target.float(), target).item() == pytest.approx(0, abs=1e-3)
    assert dice_loss(torch.zeros(1, 2, 2), target).item() == 1


def test_dice_is_zero_for_equal_masks_one_for_disjoint_ones_and_empty_for_none():
    masks = torch.zeros(2, 4, 4, dtype=torch.bool)
    masks[0, :2] = True
    masks[1, 2:] = True
    assert dice_loss(masks.float(), masks).tolist() == pytest.approx([0, 0], abs=1e-3)
    assert dice_loss(masks.float(), masks.flip(0)).tolist() == pytest.approx([1, 1], abs=1e-3)
    assert dice_loss(torch.zeros(0, 4, 4), torch.zeros(0, 4, 4)).shape == (0,)


@pytest.mark.parametrize("loss", MASK_LOSSES.values(), ids=MASK_LOSSES)
def test_none_and_certain_masks_are_ordinary(loss):
    assert loss(torch.zeros(0, 4, 4), torch.zeros(0, 4, 4, dtype=torch.bool)).shape == (0,)
    logits = torch.tensor([-200.0, 200.0]).view(2, 1, 1).expand(2, 4, 4).clone().requires_grad_()
    for target in (False, True):
        value = loss(logits.sigmoid(), torch.full((2, 4, 4), target))
        value.sum().backward()
        assert value.isfinite().all() and logits.grad.isfinite().all()


def test_half_precision_is_summed_in_float32():
    probs = torch.full((1, 400, 400), 0.9)
    target = torch.ones(1, 400, 400, dtype=torch.bool)
    for loss in (dice_loss, mask_bce_loss, mask_focal_loss):
        value = loss(probs.half(), target)
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, loss(probs.half().float(), target))
