"""Copies from the host to a device."""

import torch
from torch import Tensor


def upload(x: Tensor, device: torch.device) -> Tensor:
    """``x.to(device)``, which does not wait for a GPU to finish its queue."""
    if device.type == "cuda" and x.device.type == "cpu":
        return x.pin_memory().to(device, non_blocking=True)  # from pageable memory it would wait
    return x.to(device)
