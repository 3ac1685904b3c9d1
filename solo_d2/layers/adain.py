"""Adaptive instance normalization."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class AdaIN(nn.Module):
    """Normalize every channel of every sample, then scale and shift it by a control vector.

    ``y = (x - mean) / sqrt(var + eps) * scale(w) + bias(w)`` with two linear layers (AdaptIS,
    section 3). The published PyTorch code adds 1 to the bias (``bias_plus_one``); the MXNet code
    starts with a scale of 1 instead.
    """

    def __init__(
        self,
        control_dim: int,
        channels: int,
        *,
        eps: float = 1e-5,
        bias_plus_one: bool = True,
    ):
        """
        Args:
            control_dim: length of the control vector.
            channels: channels of the map.
            eps: added to the variance; a constant channel needs it.
            bias_plus_one: see above.
        """
        super().__init__()
        self.scale = nn.Linear(control_dim, channels)
        self.bias = nn.Linear(control_dim, channels)
        self.eps = max(eps, 1e-12)  # the MXNet code has no eps and fails for constant channels
        self.bias_plus_one = bias_plus_one

    def init_weights(self, gain: float = 1.0) -> None:
        """Xavier, Gaussian, with zero biases; without ``bias_plus_one`` the scale's bias is 1."""
        for linear in (self.scale, self.bias):
            nn.init.xavier_normal_(linear.weight, gain)
            nn.init.zeros_(linear.bias)
        if not self.bias_plus_one:
            nn.init.ones_(self.scale.bias)

    def forward(self, x: Tensor, control: Tensor, valid: Tensor | None = None) -> Tensor:
        """
        Args:
            x: (n, channels, h, w).
            control: (n, control_dim).
            valid: (n, 1, h, w) bool, the cells that count for mean and variance; None for all.
                Padding does not count: it would change every cell of the result.

        Returns:
            (n, channels, h, w) with the type of ``x``; the statistics are computed in float32.
        """
        n, channels, h, w = x.shape
        scale = self.scale(control).float()
        bias = self.bias(control).float() + float(self.bias_plus_one)
        with torch.autocast(x.device.type, enabled=False):
            wide = x.float()
            if valid is None and h * w > 1:
                # Batch norm of one sample that holds the channels of all samples. In channels-last
                # memory, the CPU's sums would be off in the second digit.
                maps = wide.contiguous().view(1, n * channels, h, w)
                y = F.batch_norm(
                    maps, None, None, scale.flatten(), bias.flatten(), training=True, eps=self.eps
                )
                # in the type and memory format of the convolutions around it
                return torch.empty_like(x).copy_(y.view(x.shape))
            if valid is None:
                valid = torch.ones_like(wide[:, :1], dtype=torch.bool)
            centered = wide - _mean(wide, valid)
            scale = scale[:, :, None, None] * (_mean(centered**2, valid) + self.eps).rsqrt()
            return torch.addcmul(bias[:, :, None, None], centered, scale).to(x.dtype)


def _mean(x: Tensor, valid: Tensor) -> Tensor:
    """(n, C, 1, 1): the mean of each channel over the cells that count."""
    share = valid.float() / valid.sum(dim=(2, 3), keepdim=True).clamp(min=1)
    return (x * share).sum(dim=(2, 3), keepdim=True)
