"""Frozen batch norm as part of the convolution before it."""

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
        norm = self.norm
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        bias = norm.bias - norm.running_mean * scale
        if self.bias is not None:
            bias = bias + self.bias * scale
        weight = self.weight * scale.view(-1, 1, 1, 1)
        x = F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)
        return x if self.activation is None else self.activation(x)


def fold_frozen_batch_norms(module: Module) -> Module:
    """Turn every ``Conv2d`` with a frozen batch norm into a ``FoldedConv2d``, in place.

    State dicts stay as they are. Layers of other classes, deformable ones too, are left alone.
    Layers change their class and are not replaced, because Detectron2's FPN and mask head also keep
    their convolutions in plain lists, and because hooks on them must survive.

    Returns:
        The module itself.
    """
    for layer in module.modules():
        if type(layer) is Conv2d and isinstance(layer.norm, FrozenBatchNorm2d):
            layer.__class__ = FoldedConv2d
    return module
