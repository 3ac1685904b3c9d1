"""Preparing a model to run: folded frozen batch norms and a memory format."""

from typing import TypeVar

import torch
from torch import nn

from solo_d2.layers.frozen_bn import fold_frozen_batch_norms

Module = TypeVar("Module", bound=nn.Module)


def prepare(model: Module) -> Module:
    """Fold frozen batch norms into their convolutions and store weights channels-last, in place.

    For any model or part of one, ours or Detectron2's. Names and values of the state dict do not
    change, and a second call has no effect. Channels-last weights make the activations
    channels-last too, regardless of the image's layout.

    Returns:
        The module itself.
    """
    return fold_frozen_batch_norms(model).to(memory_format=torch.channels_last)


def check_precision(dtype: torch.dtype, device: torch.device) -> None:
    """
    Args:
        dtype, device: of a model's weights.

    Raises:
        ValueError: the weights were converted to half precision.
    """
    if dtype in (torch.float16, torch.bfloat16):
        raise ValueError(
            f"the model was converted to {dtype}; keep its weights in float32 and call it "
            f"within torch.autocast({device.type!r}, dtype={dtype}) instead"
        )
