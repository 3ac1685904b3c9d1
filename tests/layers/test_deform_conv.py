"""Deformable convolution against a literal reading of the papers."""

import math

import pytest
import torch
from detectron2.layers import get_norm
from torch import nn
from torch.nn import functional as F

from solo_d2.layers.deform_conv import DeformConv2d


def sample(image: torch.Tensor, y: float, x: float) -> torch.Tensor:
    """Bilinear value of (C, H, W) at a point, zero outside."""
    value = torch.zeros(len(image))
    for j in (math.floor(y), math.floor(y) + 1):
        for i in (math.floor(x), math.floor(x) + 1):
            if 0 <= j < image.shape[1] and 0 <= i < image.shape[2]:
                value += (1 - abs(y - j)) * (1 - abs(x - i)) * image[:, j, i]
    return value


def literal(conv: DeformConv2d, x: torch.Tensor) -> torch.Tensor:
    """One image: sum over kernel positions of weight * (mask) * input at the moved position."""
    predicted = conv.offset(x)[0]
    positions = conv.kernel_size[0] * conv.kernel_size[1]
    out = torch.zeros(conv.out_channels, *predicted.shape[1:])
    in_group, out_group = conv.weight.shape[1], conv.out_channels // conv.groups
    for oy in range(out.shape[1]):
        for ox in range(out.shape[2]):
            for k in range(positions):
                ky, kx = divmod(k, conv.kernel_size[1])
                dy, dx = predicted[2 * k, oy, ox].item(), predicted[2 * k + 1, oy, ox].item()
                y = oy * conv.stride[0] - conv.padding[0] + ky * conv.dilation[0] + dy
                x_ = ox * conv.stride[1] - conv.padding[1] + kx * conv.dilation[1] + dx
                value = sample(x[0], y, x_)
                if conv.modulated:
                    value = value * predicted[2 * positions + k, oy, ox].sigmoid()
                for c in range(conv.out_channels):
                    g = c // out_group
                    part = value[g * in_group : (g + 1) * in_group]
                    out[c, oy, ox] += conv.weight[c, :, ky, kx] @ part
    return out if conv.bias is None else out + conv.bias[:, None, None]


def randomized(conv: DeformConv2d) -> DeformConv2d:
    for parameter in conv.parameters():
        nn.init.normal_(parameter, std=0.5)
    return conv


CASES = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 3, "padding": 1, "stride": 2, "bias": False},
    {"kernel_size": 3, "padding": 2, "dilation": 2, "groups": 2},
    {"kernel_size": 1},
]


@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize("options", CASES)
@torch.no_grad()
def test_equals_the_literal_reading(options, modulated):
    torch.manual_seed(0)
    conv = randomized(DeformConv2d(4, 6, modulated=modulated, **options))
    x = torch.randn(1, 4, 5, 6)
    torch.testing.assert_close(conv(x)[0], literal(conv, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "modulated, kernel_size, outputs", [(False, 3, 18), (True, 3, 27), (False, 1, 2), (True, 1, 3)]
)
def test_parameters_have_the_agreed_names(modulated, kernel_size, outputs):
    conv = DeformConv2d(
        8, 32, kernel_size=kernel_size, modulated=modulated, bias=False, norm=get_norm("GN", 32)
    )
    shapes = {name: tuple(p.shape) for name, p in conv.named_parameters()}
    assert shapes == {
        "weight": (32, 8, kernel_size, kernel_size),
        "offset.weight": (outputs, 8, kernel_size, kernel_size),
        "offset.bias": (outputs,),
        "norm.weight": (32,),
        "norm.bias": (32,),
    }


@pytest.mark.parametrize("modulated, factor", [(False, 1.0), (True, 0.5)])
@torch.no_grad()
def test_starts_as_a_plain_convolution(modulated, factor):
    conv = DeformConv2d(4, 6, kernel_size=3, padding=1, modulated=modulated, bias=False)
    x = torch.randn(2, 4, 7, 8)
    torch.testing.assert_close(
        conv(x), factor * F.conv2d(x, conv.weight, padding=1), rtol=1e-4, atol=1e-5
    )


def test_norm_and_activation_come_after():
    conv = DeformConv2d(
        4, 32, kernel_size=3, padding=1, bias=False, norm=get_norm("GN", 32), activation=F.relu
    )
    x = torch.randn(1, 4, 6, 6)
    expected = F.relu(conv.norm(F.conv2d(x, conv.weight, padding=1)))
    torch.testing.assert_close(conv(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("modulated", [False, True])
def test_gradient_reaches_every_parameter(modulated):
    conv = randomized(DeformConv2d(4, 6, kernel_size=3, padding=1, modulated=modulated))
    conv(torch.randn(1, 4, 6, 6)).square().sum().backward()
    for name, parameter in conv.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("modulated", [False, True])
def test_autocast_samples_in_float32(modulated):
    conv = randomized(DeformConv2d(4, 6, kernel_size=3, padding=1, modulated=modulated))
    x = torch.randn(1, 4, 6, 6).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        out = conv(x)
        offset = conv.offset(x)
    expected = conv.sample(x.float(), offset.float())  # no error except that of the offsets
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected.bfloat16())
    out.float().sum().backward()
    assert all(p.grad.isfinite().all() for p in conv.parameters())


@pytest.mark.parametrize("modulated", [False, True])
def test_an_empty_batch_is_ordinary(modulated):
    conv = DeformConv2d(4, 6, kernel_size=3, padding=1, stride=2, modulated=modulated)
    out = conv(torch.zeros(0, 4, 6, 8))
    assert out.shape == (0, 6, 3, 4)
    out.sum().backward()
