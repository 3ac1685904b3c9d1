"""Folding batch norms with fixed statistics into the convolutions before them."""

from itertools import pairwise
from typing import TypeVar

import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from torch import Tensor, nn
from torch.nn import functional as F

from .symbolic import is_exporting

Module = TypeVar("Module", bound=nn.Module)


class _Folding(nn.Module):
    """Convolutions that apply the batch norms behind them to their weights, not to the maps.

    The weights are far smaller than the activations, so this saves a pass over each map, and in
    training the memory of that pass. Parameters and their gradients are those of the plain layers.
    A norm that computes its statistics from the batch is not folded. Without gradients, products of
    weights are kept for the next call; a change of a weight or of the mode discards them.
    """

    def train(self, mode: bool = True) -> nn.Module:
        self.__dict__.pop("_kept", None)
        return super().train(mode)

    def convolve(self, x: Tensor, conv: nn.Conv2d, norm: nn.Module) -> Tensor:
        weight, bias = self._folded(x.device.type, conv, norm)
        return F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)

    def _folded(self, device: str, conv: nn.Conv2d, norm: nn.Module) -> tuple[Tensor, Tensor]:
        recording = torch.compiler.is_compiling() or torch.jit.is_tracing() or is_exporting()
        if torch.is_grad_enabled() or recording:
            return _fold(conv, norm)
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        sources = (conv.weight, norm.weight, norm.bias, norm.running_mean, norm.running_var)
        sources += () if conv.bias is None else (conv.bias,)
        state = dtype, *((x.data_ptr(), 0 if x.is_inference() else x._version) for x in sources)
        kept = self.__dict__.setdefault("_kept", {})
        if conv not in kept or kept[conv][0] != state:
            folded = _fold(conv, norm)
            kept[conv] = state, folded if dtype is None else tuple(x.to(dtype) for x in folded)
        return kept[conv][1]


class FoldedConv2d(_Folding, Conv2d):
    """A Detectron2 ``Conv2d`` with a batch norm."""

    def forward(self, x: Tensor) -> Tensor:
        if not _has_fixed_statistics(self.norm):
            return super().forward(x)
        x = self.convolve(x, self, self.norm)
        return x if self.activation is None else self.activation(x)


class FoldedSequential(_Folding, nn.Sequential):
    """A ``Sequential`` with convolutions and batch norms as layers."""

    def forward(self, x: Tensor) -> Tensor:
        folded = False
        for layer, following in pairwise([*self, None]):
            if folded:  # this is the norm
                folded = False
            elif folded := _can_fold(layer, following) and _has_fixed_statistics(following):
                x = self.convolve(x, layer, following)
            else:
                x = layer(x)
        return x


def fold_batch_norms(module: Module) -> Module:
    """Fold the batch norms of all ``Conv2d`` and ``Sequential`` of a module, in place.

    State dicts do not change. Layers with a ``forward`` of their own, such as deformable ones, are
    not touched. Layers change their class instead of being replaced, because Detectron2's FPN and
    mask head also keep their convolutions in plain lists, and because hooks on them must survive.

    Returns:
        The module itself.
    """
    for layer in module.modules():
        forward = type(layer).forward
        if forward is Conv2d.forward and _is_batch_norm(layer.norm):
            layer.__class__ = FoldedConv2d
        elif forward is nn.Sequential.forward and any(_can_fold(*p) for p in pairwise(layer)):
            layer.__class__ = FoldedSequential
    return module


def fold_permanently(module: Module) -> Module:
    """Replace the weights of each ``Conv2d`` by their product with its batch norm, in place.

    For a module in eval mode that will not be trained: it holds no weights twice. The norms and
    their part of the state dict are gone.

    Returns:
        The module itself.
    """
    for layer in module.modules():
        if type(layer) is FoldedConv2d:
            with torch.no_grad():
                weight, bias = _fold(layer, layer.norm)
            layer.weight, layer.bias = nn.Parameter(weight, False), nn.Parameter(bias, False)
            layer.norm, layer.__class__ = None, Conv2d
    return module


def _is_batch_norm(norm: nn.Module | None) -> bool:
    if isinstance(norm, nn.BatchNorm2d | nn.SyncBatchNorm):
        return norm.affine and norm.track_running_stats
    return isinstance(norm, FrozenBatchNorm2d)


def _has_fixed_statistics(norm: nn.Module) -> bool:
    return isinstance(norm, FrozenBatchNorm2d) or not norm.training


def _can_fold(layer: nn.Module, following: nn.Module | None) -> bool:
    is_plain = type(layer) is nn.Conv2d and layer.padding_mode == "zeros"
    return is_plain and _is_batch_norm(following)


def _fold(conv: nn.Conv2d, norm: nn.Module) -> tuple[Tensor, Tensor]:
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    bias = norm.bias - norm.running_mean * scale
    if conv.bias is not None:
        bias = bias + conv.bias * scale
    return conv.weight * scale.view(-1, 1, 1, 1), bias
