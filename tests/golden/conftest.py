"""Fixtures that golden tests share."""

import pytest
import torch
from torch import Tensor


def _recorded_order(
    scores: Tensor,
    boxes: Tensor,
    recorded_scores: Tensor,
    recorded_boxes: Tensor,
    *,
    tolerance: float,
) -> Tensor:
    """The index of our detection for each recorded one: the nearest box among equal scores.

    Only detections whose scores differ by at most ``tolerance`` change places, so this never
    repairs a wrong order, and ours must be in descending order.
    """
    assert scores.shape == recorded_scores.shape, "another number of detections"
    assert (scores.diff() <= 0).all()
    tied = (recorded_scores[:, None] - scores).abs() <= tolerance
    distance = torch.cdist(recorded_boxes.double(), boxes.double(), p=torch.inf)
    distance = distance.masked_fill(~tied, torch.inf)
    order = []
    for row in distance:
        order.append(int(row.argmin()))
        assert row.isfinite().any(), "a recorded score is missing"
        distance[:, order[-1]] = torch.inf  # taken
    return torch.tensor(order, dtype=torch.long)


@pytest.fixture(scope="session")
def recorded_order():
    """Scores within a golden file's tolerance count as tied; see ``_recorded_order``."""
    return _recorded_order
