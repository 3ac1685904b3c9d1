"""Anchors and boxes that several test files share."""

import pytest
import torch

from solo_d2.modeling.yolact.anchors import AnchorGenerator, to_corners


@pytest.fixture(scope="session")
def generator() -> AnchorGenerator:
    return AnchorGenerator(sizes=[12.0, 24.0], aspect_ratios=[1.0, 0.5, 2.0], square=False)


@pytest.fixture(scope="session")
def anchors(generator) -> torch.Tensor:
    """Anchors on two levels of a 64 x 96 input."""
    return generator([(8, 12), (4, 6)], (64, 96))


@pytest.fixture(scope="session")
def random_boxes():
    def make(seed: int, n: int) -> torch.Tensor:
        g = torch.Generator().manual_seed(seed)
        center, size = torch.rand(n, 2, generator=g), torch.rand(n, 2, generator=g) * 0.5 + 0.01
        return to_corners(torch.cat([center, size], dim=1))

    return make
