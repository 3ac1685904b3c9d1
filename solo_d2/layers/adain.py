"""Adaptive instance normalisation."""

import torch
from torch import Tensor, nn


class AdaIN(nn.Module):
    """Normalise every channel of every sample, then scale and shift it by a control vector.

    ``y = (x - mean) / sqrt(var + eps) * scale(w) + bias(w)`` with two linear layers (AdaptIS,
    section 3). The published PyTorch code adds 1 to the bias (``bias_plus_one``), the one in MXNet
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
            channels: of the map.
            eps: added to the variance; a constant channel needs it.
            bias_plus_one: see above.
        """
        super().__init__()
        self.scale = nn.Linear(control_dim, channels)
        self.bias = nn.Linear(control_dim, channels)
        self.eps = eps
        self.bias_plus_one = bias_plus_one

    def init_weights(self, gain: float = 1.0) -> None:
        """Xavier, Gaussian; zero biases but for the scale's without ``bias_plus_one``."""
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
                Others, padding, would change every cell of the result.

        Returns:
            (n, channels, h, w) of the type of ``x``; the statistics are taken in float32.
        """
        wide = x.float()
        if valid is None:
            var, mean = torch.var_mean(wide, dim=(2, 3), correction=0, keepdim=True)
        else:
            weight = valid.float() / valid.sum(dim=(2, 3), keepdim=True).clamp(min=1)
            mean = (wide * weight).sum(dim=(2, 3), keepdim=True)
            var = ((wide - mean) ** 2 * weight).sum(dim=(2, 3), keepdim=True)
        scale = self.scale(control).float()[:, :, None, None] * (var + self.eps).rsqrt()
        bias = self.bias(control).float()[:, :, None, None] + float(self.bias_plus_one)
        return torch.addcmul(bias, wide - mean, scale).to(x.dtype)
