"""Reading maps at points, and coordinates relative to points."""

import pytest
import torch

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
    # the distance is computed from the offsets before they are clamped, then clamped itself
    assert maps[0, 2, 3, 4] == pytest.approx(0.5 * 2**0.5)


def test_coordinates_swap_with_the_axes():
    a = relative_coordinates(torch.tensor([[1.0, 5.0]]), (6, 9), radius=4.0)
    b = relative_coordinates(torch.tensor([[5.0, 1.0]]), (9, 6), radius=4.0)
    assert torch.equal(a[:, [1, 0, 2]], b.transpose(2, 3))


def test_the_distance_is_an_option():
    points = torch.tensor([[1.0, 5.0]])
    two = relative_coordinates(points, (6, 9), radius=4.0, append_distance=False)
    assert torch.equal(two, relative_coordinates(points, (6, 9), radius=4.0)[:, :2])
