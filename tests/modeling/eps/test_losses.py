"""The losses, by hand on maps of a few pixels."""

import pytest
import torch

from solo_d2.modeling.eps.losses import (
    classification_loss,
    estimate_saliency,
    overlap,
    saliency_loss,
)

BIG = 50.0


def cam_of(rows):
    """(1, channels, 1, pixels) logits of the classes that the pixels certainly have."""
    labels = torch.tensor(rows)
    return BIG * torch.nn.functional.one_hot(labels, 3).T[None, :, None].float()


# two classes and the background (2): pixels 0 and 1 are class 0, 2 is class 1
CAM = cam_of([0, 0, 1, 2])
SALIENCY = torch.tensor([1.0, 0.0, 0.0, 0.0]).view(1, 1, 1, 4)


def test_overlap_is_the_salient_share_of_a_class():
    found = overlap(CAM.softmax(dim=1)[:, :2], SALIENCY)
    torch.testing.assert_close(found, torch.tensor([[1 / 2.0004, 0.0]]))


@pytest.mark.parametrize(
    ("labels", "tau", "foreground", "not_background"),
    [
        ([1.0, 1.0], 0.4, [1, 1, 0, 0], [1, 1, 0, 0]),  # class 1 does not overlap: background
        ([1.0, 1.0], 0.6, [0, 0, 0, 0], [0, 0, 0, 0]),  # neither does class 0
        ([1.0, 0.0], 0.4, [1, 1, 0, 0], [1, 1, 1, 0]),  # an absent class is neither
        ([0.0, 0.0], 0.4, [0, 0, 0, 0], [1, 1, 1, 0]),
    ],
)
def test_classes_that_overlap_the_saliency_are_foreground(labels, tau, foreground, not_background):
    parts = estimate_saliency(CAM, torch.tensor([labels]), SALIENCY, tau=tau, lam=0.25)
    expected = [torch.tensor(x).float().view(1, 1, 1, 4) for x in (foreground, not_background)]
    torch.testing.assert_close(parts[0], expected[0])
    torch.testing.assert_close(parts[1], expected[1])
    torch.testing.assert_close(parts[2], 0.25 * expected[0] + 0.75 * expected[1])


def test_the_saliency_loss_is_the_mean_squared_difference_at_the_size_of_the_map():
    # class 0 is foreground, class 1 background: the estimate is [1, 1, 0, 0]
    doubled = SALIENCY.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    labels = torch.ones(1, 2)
    for saliency in (SALIENCY, doubled):
        loss = saliency_loss(CAM, labels, saliency, tau=0.4, lam=0.5)
        assert loss.item() == pytest.approx(1 / 4)


def test_the_classification_loss_leaves_out_the_background():
    cam = torch.tensor([2.0, -1.0, 7.0]).view(1, 3, 1, 1).expand(1, 3, 2, 2)
    log = torch.nn.functional.logsigmoid(torch.tensor([2.0, 1.0]))
    loss = classification_loss(cam, torch.tensor([[1.0, 0.0]]))
    torch.testing.assert_close(loss, -log.mean())
