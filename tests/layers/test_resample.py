import pytest
import torch
from torch.nn import functional as F

from solo_d2.layers.resample import ALIGNMENTS, UpsampledConv2d, align_to_grid


@pytest.mark.parametrize("kernel_size", [1, 3, 5])
@pytest.mark.parametrize("channels", [[0], [4, 1, 4], [], range(7)])
def test_selected_channels_equal_those_of_the_whole_and_so_do_gradients(kernel_size, channels):
    torch.manual_seed(0)
    conv = UpsampledConv2d(3, 7, kernel_size=kernel_size).double()
    x = torch.randn(2, 3, 5, 6, dtype=torch.double, requires_grad=True)
    channels = torch.tensor(list(channels), dtype=torch.long)
    upsampled = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
    padding = kernel_size // 2
    expected = F.conv2d(upsampled, conv.weight, conv.bias, padding=padding)[1, channels]
    out = conv.select(x[1], channels)
    assert out.shape == (len(channels), 10, 12) and out.dtype == torch.float32
    torch.testing.assert_close(out, expected.float())
    torch.testing.assert_close(conv(x)[1, channels], expected)
    of = [x, conv.weight, conv.bias]
    weights = torch.randn(out.shape)
    ours = torch.autograd.grad((out * weights).sum(), of)
    for a, b in zip(ours, torch.autograd.grad((expected * weights).sum(), of)):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_alignment_to_check_by_eye():
    rows = torch.tensor([0.0, 1, 2, 3, 4, 5, 6, 70])
    feature = rows.view(1, 1, 8, 1).expand(1, 1, 8, 8)
    # a cell is 4 rows high, its center lies between the second and the third
    found = {
        method: align_to_grid(feature, 2, method)[0, 0, :, 0].tolist() for method in ALIGNMENTS
    }
    assert found == {
        "interpolate": [1.5, 5.5],
        "adaptive_pool": [3.0, 70.0],
        # at a quarter and at three quarters of the cell: means of two rows each
        "region_grid": [(0.5 + 2.5) / 2, (4.5 + 38) / 2],
    }


@pytest.mark.parametrize("method", ALIGNMENTS)
@pytest.mark.parametrize("size", [(1, 1), (3, 50), (13, 7)])
def test_every_alignment_takes_maps_smaller_and_larger_than_the_grid(method, size):
    feature = torch.rand(2, 4, *size)
    cells = align_to_grid(feature, 12, method)
    assert cells.shape == (2, 4, 12, 12)
    low, high = feature.aminmax()
    assert low - 1e-6 <= cells.min() and cells.max() <= high + 1e-6
