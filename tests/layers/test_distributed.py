"""Division of losses by counts over all processes, with two real ones."""

import socket

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from solo_d2.layers.distributed import normalize_per_process, normalizer

# per process: images with different numbers of positives
INPUTS = [torch.tensor([[1.0, 2.0], [3.0, -1.0], [0.5, 4.0]]), torch.tensor([[-2.0, 1.0]])]


@pytest.mark.parametrize(
    "count, plus, expected", [(5, 0, 5), (5, 1, 6), (0, 1, 1), (0, 0, 1), (0.5, 0, 1)]
)
def test_one_process_divides_by_its_own_count_of_at_least_one(count, plus, expected):
    given = torch.tensor(count)
    value = normalizer(given, plus)
    assert value.item() == expected and value.dtype == torch.float32
    assert given.item() == count  # not summed in place


def loss(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x).square().sum() / normalizer(torch.tensor(len(x)), plus=1)


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(2, 1)


def work(rank: int, port: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    model = DistributedDataParallel(linear())
    loss(model, INPUTS[rank]).backward()
    shares = [normalizer(torch.tensor(n[rank])).item() for n in ((3, 4), (0, 0))]
    normalize_per_process()
    shares.append(normalizer(torch.tensor(5 + rank)).item())
    torch.save((model.module.weight.grad, shares), f"{folder}/{rank}.pth")
    torch.distributed.destroy_process_group()


def test_gradients_of_two_processes_are_those_of_one_with_all_images(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(work, (port, str(tmp_path)), nprocs=2, start_method="fork")
    model = linear()
    loss(model, torch.cat(INPUTS)).backward()
    for rank in range(2):
        gradient, shares = torch.load(tmp_path / f"{rank}.pth")
        torch.testing.assert_close(gradient, model.weight.grad)
        assert shares == [3.5, 0.5, 5 + rank]
