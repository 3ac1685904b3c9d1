"""Sums over the processes that train together."""

import torch
from detectron2.utils import comm
from torch import Tensor


def normalizer(count: Tensor, plus: float = 0.0) -> Tensor:
    """(``count`` summed over all processes + ``plus``, at least 1) / number of processes.

    Divide a sum over the local images by it. After DistributedDataParallel has averaged the
    gradients, they equal those of one process with all images in one batch.

    Args:
        count: a scalar.
        plus: a constant.
    """
    total = count.detach().float()
    world_size = comm.get_world_size()
    if world_size > 1:
        total = total.clone()
        torch.distributed.all_reduce(total)
    return (total + plus).clamp(min=1) / world_size
