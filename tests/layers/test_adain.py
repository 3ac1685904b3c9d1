import pytest
import torch

from solo_d2.layers.adain import AdaIN


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


def test_a_single_cell_has_no_variance_and_becomes_the_bias(adain):
    x, control = torch.rand(2, 6, 1, 1), torch.rand(2, 4)
    expected = adain.bias(control)[:, :, None, None] + adain.bias_plus_one
    torch.testing.assert_close(adain(x, control), expected)


def test_half_precision_stays_but_the_statistics_are_exact(adain):
    x = 1000 + torch.rand(1, 6, 5, 7)
    with torch.autocast("cpu", torch.bfloat16):
        y = adain(x.bfloat16(), torch.rand(1, 4))
    assert y.dtype == torch.bfloat16 and y.isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("bias_plus_one", [False, True])
def test_every_channel_is_normalized_then_scaled_and_shifted(bias_plus_one):
    torch.manual_seed(0)
    layer = AdaIN(4, 6, bias_plus_one=bias_plus_one)
    x, control = 5 + 3 * torch.randn(2, 6, 5, 7), torch.randn(2, 4)
    expected = torch.empty_like(x)
    for sample, w, out in zip(x, control, expected):
        for c in range(6):
            normalized = (sample[c] - sample[c].mean()) / (
                sample[c].var(unbiased=False) + 1e-5
            ).sqrt()
            out[c] = normalized * layer.scale(w)[c] + layer.bias(w)[c] + bias_plus_one
    torch.testing.assert_close(layer(x, control), expected, atol=1e-5, rtol=1e-5)


def test_initial_scales_and_biases_follow_the_two_published_codes():
    for bias_plus_one, scale in ((True, 0.0), (False, 1.0)):
        layer = AdaIN(4, 6, bias_plus_one=bias_plus_one)
        layer.init_weights(gain=0.0)
        y = layer(torch.randn(1, 6, 5, 7), torch.randn(1, 4))
        spread, mean = torch.std_mean(y, dim=(2, 3), unbiased=False)
        expected = torch.full((1, 6), scale), torch.full((1, 6), float(bias_plus_one))
        torch.testing.assert_close((spread, mean), expected, atol=1e-4, rtol=0)
