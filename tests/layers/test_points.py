"""Reading maps at points, coordinates relative to points, adaptive instance normalization."""

import pytest
import torch

from solo_d2.layers.adain import AdaIN
from solo_d2.layers.points import read_at_points, relative_coordinates


def test_a_cell_is_read_at_its_index_and_between_cells_it_is_bilinear():
    feature = torch.arange(12.0).view(1, 1, 3, 4)
    points = torch.tensor([[[0, 0], [2, 3], [1, 0.5], [0.5, 1]]])
    assert read_at_points(feature, points)[:, 0].tolist() == [0, 11, 4.5, 3]


def test_points_are_in_image_pixels_whatever_the_stride():
    feature = torch.rand(1, 2, 5, 6)
    points = torch.tensor([[[8.0, 4.0]]])
    assert torch.equal(read_at_points(feature, points, 1 / 4)[0], feature[0, :, 2, 1])


def test_a_point_off_the_map_is_read_at_its_border():
    feature = torch.rand(2, 3, 4, 5)
    points = torch.tensor([[[-1.0, -7.0], [99.0, 99.0]]]).expand(2, 2, 2)
    vectors = read_at_points(feature, points).view(2, 2, 3)
    assert torch.equal(vectors[:, 0], feature[:, :, 0, 0])
    assert torch.equal(vectors[:, 1], feature[:, :, -1, -1])


def test_vectors_come_image_by_image_and_pass_gradients_to_the_map():
    feature = torch.rand(2, 3, 4, 5, requires_grad=True)
    points = torch.tensor([[[0.0, 0.0], [1.0, 1.0]], [[2.0, 2.0], [3.0, 3.0]]])
    vectors = read_at_points(feature, points)
    assert torch.equal(vectors[2], feature[1, :, 2, 2])
    vectors.sum().backward()
    assert feature.grad.sum() == 4 * 3


def test_coordinates_are_zero_at_the_point_and_one_at_the_radius():
    maps = relative_coordinates(torch.tensor([[2.0, 3.0]]), (8, 9), radius=2.0)
    assert maps.shape == (1, 3, 8, 9)
    assert maps[0, :, 2, 3].tolist() == [0, 0, 0]
    assert maps[0, :, 4, 3].tolist() == [1, 0, 1]
    assert maps[0, :, 2, 0].tolist() == [0, -1, 1]
    # the distance is that of the offsets before they are clamped, then clamped itself
    assert maps[0, 2, 3, 4] == pytest.approx(0.5 * 2**0.5)


def test_coordinates_swap_with_the_axes():
    a = relative_coordinates(torch.tensor([[1.0, 5.0]]), (6, 9), radius=4.0)
    b = relative_coordinates(torch.tensor([[5.0, 1.0]]), (9, 6), radius=4.0)
    assert torch.equal(a[:, [1, 0, 2]], b.transpose(2, 3))


def test_the_distance_is_an_option():
    points = torch.tensor([[1.0, 5.0]])
    two = relative_coordinates(points, (6, 9), radius=4.0, append_distance=False)
    assert torch.equal(two, relative_coordinates(points, (6, 9), radius=4.0)[:, :2])


@pytest.fixture
def adain():
    torch.manual_seed(0)
    return AdaIN(4, 6)


@torch.no_grad()
def test_padding_does_not_change_what_is_normalized(adain):
    x, w = torch.rand(2, 6, 5, 7), torch.rand(2, 4)
    padded = torch.full((2, 6, 8, 9), 100.0)
    padded[:, :, :5, :7] = x
    valid = torch.zeros(2, 1, 8, 9, dtype=torch.bool)
    valid[:, :, :5, :7] = True
    torch.testing.assert_close(
        adain(padded, w, valid)[:, :, :5, :7], adain(x, w), atol=1e-5, rtol=1e-5
    )


@torch.no_grad()
def test_the_memory_layout_does_not_change_what_is_normalized(adain):
    x, w = torch.rand(2, 6, 50, 70), torch.rand(2, 4)
    last = adain(x.contiguous(memory_format=torch.channels_last), w)
    torch.testing.assert_close(last, adain(x, w), atol=1e-5, rtol=1e-5)


def test_a_constant_channel_is_finite_without_an_eps_too():
    layer = AdaIN(4, 6, eps=0.0, bias_plus_one=False)
    layer.init_weights()
    x = torch.rand(1, 6, 5, 7)
    x[:, 2] = 3.0
    x.requires_grad_()
    y = layer(x, torch.rand(1, 4))
    y.sum().backward()
    assert y.isfinite().all() and x.grad.isfinite().all()


def test_half_precision_stays_but_the_statistics_are_exact(adain):
    x = 1000 + torch.rand(1, 6, 5, 7)
    with torch.autocast("cpu", torch.bfloat16):
        y = adain(x.bfloat16(), torch.rand(1, 4))
    assert y.dtype == torch.bfloat16 and y.isfinite().all()
