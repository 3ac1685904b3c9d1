"""Several processes on one or more machines, on CUDA devices (NCCL) or on CPUs (gloo)."""

import os
import socket
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from detectron2.engine import DEFAULT_TIMEOUT
from detectron2.utils import comm
from torch import multiprocessing as mp

from solo_d2.errors import UserError, one_line


def launch(
    main: Callable[..., Any],
    num_processes: int,
    *,
    device: str,
    num_machines: int = 1,
    machine_rank: int = 0,
    dist_url: str = "auto",
    args: tuple = (),
) -> None:
    """Call ``main(*args)`` in each process; Detectron2's ``launch``, which knows no CPUs on a box
    that has GPUs, and hides an error's message in tracebacks of processes.

    Args:
        main: of a module that a new process can import.
        num_processes: per machine; with CUDA each has the GPU of its local rank.
        device: MODEL.DEVICE, "cpu" or "cuda".
        num_machines, machine_rank: this must be called on every machine.
        dist_url: where the processes meet; "auto" takes a free port of this machine.
        args: can be pickled.

    Raises:
        UserError: raised by ``main`` in any process, or there are fewer GPUs than processes.
    """
    use_cuda = torch.device(device).type == "cuda"
    if use_cuda and num_processes > torch.cuda.device_count():
        raise UserError(
            f"--num-gpus is {num_processes}, but {torch.cuda.device_count()} CUDA devices are "
            "visible; MODEL.DEVICE cpu trains without"
        )
    world_size = num_processes * num_machines
    if world_size == 1:
        main(*args)
        return
    if dist_url == "auto":
        if num_machines > 1:
            raise UserError("--dist-url auto is for one machine; name a tcp:// address")
        dist_url = f"tcp://127.0.0.1:{_free_port()}"
    # A new process has no error to show but its exit code, so messages come through a queue.
    errors = mp.get_context("spawn").SimpleQueue()
    first_rank = machine_rank * num_processes
    options = (main, args, num_processes, first_rank, world_size, dist_url, use_cuda, errors)
    try:
        mp.spawn(_run, args=options, nprocs=num_processes)
    except mp.ProcessExitedException:
        if errors.empty():
            raise
        raise UserError(errors.get()) from None


def _run(
    local_rank: int,
    main: Callable[..., Any],
    args: tuple,
    num_processes: int,
    first_rank: int,
    world_size: int,
    dist_url: str,
    use_cuda: bool,
    errors: Any,
) -> None:
    if use_cuda:
        torch.cuda.set_device(local_rank)
    elif "OMP_NUM_THREADS" not in os.environ:
        # or else each process would take all cores
        torch.set_num_threads(max(1, torch.get_num_threads() // num_processes))
    dist.init_process_group(
        "nccl" if use_cuda else "gloo",
        init_method=dist_url,
        world_size=world_size,
        rank=first_rank + local_rank,
        timeout=DEFAULT_TIMEOUT,
    )
    comm.create_local_process_group(num_processes)
    comm.synchronize()
    try:
        main(*args)
    except UserError as error:
        errors.put(one_line(error))
        raise SystemExit(1) from None
    dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
