import pytest
import torch
from torch import nn

from solo_d2.layers.coord import append_coordinates


def test_coordinates_reach_both_ends_and_follow_the_feature():
    out = append_coordinates(torch.zeros(2, 3, 4, 5))
    assert out.shape == (2, 5, 4, 5)
    assert out[1, 3, 0].tolist() == [-1, -0.5, 0, 0.5, 1]  # x along a row
    assert out[1, 4, :, 0].tolist() == pytest.approx([-1, -1 / 3, 1 / 3, 1])  # y along a column


def test_coordinates_of_one_axis_are_those_of_both():
    feature = torch.rand(2, 3, 4, 5)
    both = append_coordinates(feature)
    assert torch.equal(append_coordinates(feature, "x"), both[:, [0, 1, 2, 3]])
    assert torch.equal(append_coordinates(feature, "y"), both[:, [0, 1, 2, 4]])
    assert torch.equal(append_coordinates(feature, ""), feature)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 200, 333])
def test_coordinates_are_those_of_linspace(size):
    row = append_coordinates(torch.zeros(1, 1, 2, size), "x")[0, 1, 0]
    torch.testing.assert_close(row, torch.linspace(-1, 1, size), atol=2e-7, rtol=0)
    assert row[0] == -1 and (size == 1 or row[-1] == 1)


def test_a_map_without_channels_gets_coordinates_of_its_type():
    out = append_coordinates(torch.zeros(2, 0, 300, 4, dtype=torch.bfloat16))
    assert out.shape == (2, 2, 300, 4) and out.dtype == torch.bfloat16
    # whole numbers above 256 have no bfloat16: the coordinates are rounded only at the end
    assert torch.equal(out[0, 1, :, 0], torch.linspace(-1, 1, 300).bfloat16())


def test_a_traced_graph_takes_maps_of_other_sizes():
    class Append(nn.Module):
        def forward(self, x):
            return append_coordinates(x)

    traced = torch.jit.trace(Append(), torch.rand(1, 2, 4, 5))
    other = torch.rand(3, 2, 6, 9)
    assert torch.equal(traced(other), append_coordinates(other))
