"""Preparing a model to run: folded batch norms, memory format, activation checkpointing."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, TypeVar

import torch
from detectron2.layers import Conv2d
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from solo_d2.layers.frozen_bn import fold_batch_norms, fold_permanently

from .options import check_choice

Module = TypeVar("Module", bound=nn.Module)


def prepare(model: Module) -> Module:
    """Fold batch norms into their convolutions and store weights channels-last, in place.

    For any model or part of one, ours or Detectron2's. Names and values of the state dict do not
    change, and a second call has no effect. Channels-last weights make the activations
    channels-last too, regardless of the image's layout.

    Returns:
        The module itself.
    """
    return fold_batch_norms(model).to(memory_format=torch.channels_last)


def prepare_for_inference(model: Module, dtype: str | torch.dtype = "float32") -> Module:
    """``prepare`` a model that will not be trained again, in place; it is in eval mode then.

    Weights are stored as the convolutions use them: multiplied by their batch norms, and in the
    type that ``precision`` would convert them to at each call.

    Returns:
        The module itself.
    """
    fold_permanently(prepare(model.eval()))
    name = str(dtype).removeprefix("torch.")
    for module in model.modules() if name != "float32" else ():
        if type(module) in (nn.Conv2d, Conv2d, nn.ConvTranspose2d, nn.Linear):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(getattr(torch, name))
    return model


def checkpoint_activations(backbone: Module) -> Module:
    """In training, keep only the inputs of the backbone's blocks, in place.

    A block (of a ResNet, for example) is a layer of a ``Sequential`` that has layers of its own.
    The backward pass computes it again, which needs less memory and more time. Results, gradients
    and statistics of batch norms do not change, and a second call has no effect.

    Returns:
        The module itself.
    """
    inside: set[nn.Module] = set()
    for sequential in [x for x in backbone.modules() if isinstance(x, nn.Sequential)]:
        for block in sequential if sequential not in inside else ():
            if any(True for _ in block.children()):
                block.forward = partial(_checkpointed, block)
                inside.update(block.modules())
    return backbone


def _checkpointed(block: nn.Module, *args: Any) -> Any:
    forward = partial(type(block).forward, block)
    if not torch.is_grad_enabled():
        return forward(*args)
    return checkpoint(
        forward,
        *args,
        use_reentrant=False,
        context_fn=lambda: (nullcontext(), _unchanged_statistics(block)),
    )


@contextmanager
def _unchanged_statistics(block: nn.Module) -> Iterator[None]:
    """Batch norms keep their running statistics, which the first pass has updated already."""
    norms = [x for x in block.modules() if isinstance(x, _BatchNorm) and x.track_running_stats]
    before = [(norm.momentum, norm.num_batches_tracked.clone()) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before):
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(count)


DTYPES = ("float32", "bfloat16", "float16")


def precision(device_type: str, dtype: str | torch.dtype) -> torch.autocast:
    """The context in which inference runs convolutions and matrix products in a type.

    Args:
        device_type: "cpu" or "cuda".
        dtype: one of ``DTYPES``; float32 leaves everything as it is. bfloat16 is quick on CPUs with
            AVX512-BF16 or AMX, float16 on no CPU.

    Raises:
        ValueError: the device does not run ``dtype``.
    """
    name = str(dtype).removeprefix("torch.")
    check_choice("dtype", name, DTYPES if device_type != "cpu" else DTYPES[:2])
    return torch.autocast(device_type, getattr(torch, name), enabled=name != "float32")


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
