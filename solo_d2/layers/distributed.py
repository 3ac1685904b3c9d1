"""What losses are divided by in several processes."""

import torch
from detectron2.utils import comm
from torch import Tensor

_per_process = False


def normalize_per_process(enabled: bool = True) -> None:
    """Count in each process alone, as the published code does; call it in every process.

    Then N processes differ from one with the joint batch: images of a process with few objects
    weigh more.
    """
    global _per_process
    _per_process = enabled


def normalizer(count: Tensor, plus: float = 0.0) -> Tensor:
    """(``count`` summed over all processes + ``plus``, at least 1) / number of processes.

    Divide a sum over the local images by it. After DistributedDataParallel has averaged the
    gradients, they equal those of one process with all images in one batch. After
    ``normalize_per_process`` it is ``count`` + ``plus``, at least 1.

    Args:
        count: a scalar.
        plus: a constant.
    """
    total = count.detach().float()
    world_size = 1 if _per_process else comm.get_world_size()
    if world_size > 1:
        total = total.clone()
        torch.distributed.all_reduce(total)
    return (total + plus).clamp(min=1) / world_size
