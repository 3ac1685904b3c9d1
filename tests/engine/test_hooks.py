import itertools
import json

import pytest
import torch
from detectron2.engine import SimpleTrainer
from detectron2.utils.events import EventStorage
from torch import distributed as dist
from torch import multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from solo_d2.engine import NonFiniteLossError
from solo_d2.engine.hooks import StopAtNonFiniteLoss


class TwoLosses(nn.Module):
    """``loss_b`` is given by the input."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def forward(self, batch):
        value = torch.tensor([[x["value"]] for x in batch])
        return {"loss_a": self.layer(torch.ones(1, 1)).mean(), "loss_b": self.layer(value).mean()}


def step(folder, rank, value):
    """One step on an image of this value; returns the error's message, or None."""
    model = DistributedDataParallel(TwoLosses())
    batch = [{"image_id": rank, "file_name": f"{rank}.png", "value": value}]
    trainer = SimpleTrainer(
        model, itertools.repeat(batch), torch.optim.SGD(model.parameters(), lr=0.1)
    )
    trainer.register_hooks([StopAtNonFiniteLoss(model, str(folder))])
    trainer.iter = 7
    with EventStorage():
        try:
            trainer.run_step()
        except NonFiniteLossError as error:
            return str(error)
        return None


def in_a_process(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    messages = [step(folder, rank, value) for value in (1.0, [1.0, float("nan")][rank])]
    (folder / f"{rank}.json").write_text(json.dumps(messages))
    dist.destroy_process_group()


def test_a_nan_in_one_process_stops_both_before_their_step(tmp_path):
    mp.start_processes(in_a_process, (tmp_path,), nprocs=2, start_method="fork")
    for rank in range(2):
        first, second = json.loads((tmp_path / f"{rank}.json").read_text())
        assert first is None
        assert second.startswith("iteration 7: loss_b is not finite")
    report = json.loads((tmp_path / "nonfinite_loss.json").read_text())
    assert [p["images"] for p in report["processes"]] == [
        [{"image_id": rank, "file_name": f"{rank}.png"}] for rank in range(2)
    ]
    assert report["processes"][0]["losses"]["loss_b"] == pytest.approx(
        report["processes"][0]["losses"]["loss_a"]
    )
    assert report["processes"][1]["losses"]["loss_b"] == "nan"


class Scaler:
    """Stands for a ``GradScaler`` of ``AMPTrainer``."""

    def __init__(self, scale):
        self.scale = scale

    def get_scale(self):
        return self.scale


@pytest.mark.parametrize(("scale", "message"), [(65536.0, None), (2.0**-30, "every loss scale")])
def test_overflows_of_mixed_precision_stop_training_only_if_no_scale_helps(
    tmp_path, scale, message
):
    model = TwoLosses()
    trainer = SimpleTrainer(model, [], torch.optim.SGD(model.parameters(), lr=0.1))
    trainer.grad_scaler = Scaler(scale)
    hook = StopAtNonFiniteLoss(model, str(tmp_path))
    trainer.register_hooks([hook])
    model([{"value": 1.0}])
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, float("inf"))
    if message is None:
        trainer.after_backward()
    else:
        with pytest.raises(NonFiniteLossError, match=message):
            trainer.after_backward()
