"""Folding frozen batch norms into the convolutions before them."""

from itertools import pairwise
from typing import TypeVar

from detectron2.layers import Conv2d, FrozenBatchNorm2d
from torch import Tensor, nn
from torch.nn import functional as F

Module = TypeVar("Module", bound=nn.Module)


class FoldedConv2d(Conv2d):
    """A Detectron2 ``Conv2d`` whose frozen batch norm is applied to the weights, not to the map.

    The weights are far smaller than the activations, so this saves a pass over each map, and in
    training the memory of that pass. Parameters and their gradients are those of the plain layer.
    """

    def forward(self, x: Tensor) -> Tensor:
        x = _convolve(x, self, self.norm)
        return x if self.activation is None else self.activation(x)


class FoldedSequential(nn.Sequential):
    """The same for a ``Sequential`` with convolutions and frozen batch norms as layers."""

    def forward(self, x: Tensor) -> Tensor:
        folded = False
        for layer, following in pairwise([*self, None]):
            if folded:  # this is the norm
                folded = False
            elif folded := _can_fold(layer, following):
                x = _convolve(x, layer, following)
            else:
                x = layer(x)
        return x


def fold_frozen_batch_norms(module: Module) -> Module:
    """Fold the frozen batch norms of all ``Conv2d`` and ``Sequential`` of a module, in place.

    State dicts do not change. Layers of other classes, including deformable ones, are not touched.
    Layers change their class instead of being replaced, because Detectron2's FPN and mask head also
    keep their convolutions in plain lists, and because hooks on them must survive.

    Returns:
        The module itself.
    """
    for layer in module.modules():
        if type(layer) is Conv2d and isinstance(layer.norm, FrozenBatchNorm2d):
            layer.__class__ = FoldedConv2d
        elif type(layer).forward is nn.Sequential.forward:
            if any(_can_fold(*pair) for pair in pairwise(layer)):
                layer.__class__ = FoldedSequential
    return module


def _can_fold(layer: nn.Module, following: nn.Module | None) -> bool:
    return (
        type(layer) is nn.Conv2d
        and layer.padding_mode == "zeros"
        and isinstance(following, FrozenBatchNorm2d)
    )


def _convolve(x: Tensor, conv: nn.Conv2d, norm: FrozenBatchNorm2d) -> Tensor:
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    bias = norm.bias - norm.running_mean * scale
    if conv.bias is not None:
        bias = bias + conv.bias * scale
    weight = conv.weight * scale.view(-1, 1, 1, 1)
    return F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)
