"""Sums over the processes that train together."""

import torch
from detectron2.utils import comm
from torch import Tensor


def normaliser(count: Tensor) -> Tensor:
    """This process's share of the sum of ``count`` over all processes, of a sum of at least 1.

    Divided by it, a sum over the local images has, after the averaging of gradients over
    processes, the gradient of one process on the joined batch.

    Args:
        count: a scalar.
    """
    total = count.detach().float()
    world_size = comm.get_world_size()
    if world_size > 1:
        total = total.clone()
        torch.distributed.all_reduce(total)
    return total.clamp(min=1) / world_size
