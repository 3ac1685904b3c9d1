import argparse
import importlib.util
import json

import pytest
import torch

from solo_d2.engine import launch
from solo_d2.errors import UserError


@pytest.fixture(scope="module")
def two_processes(start_process, tiny_solov2_config, tmp_path_factory):
    """The folder that two_processes.py filled, and what one process computes for its gradients."""
    folder = tmp_path_factory.mktemp("two")
    process = start_process("tests/engine/two_processes.py", tiny_solov2_config, str(folder))
    output = process.end(1)
    spec = importlib.util.spec_from_file_location(
        "two_processes", __file__.replace("test_distributed", "two_processes")
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    alone = module.gradients(module.tiny_solov2(tiny_solov2_config))
    return argparse.Namespace(folder=folder, alone=alone, output=output)


def test_gradients_of_two_processes_equal_those_of_the_joined_batch(two_processes):
    together = torch.load(two_processes.folder / "gradients.pth", weights_only=True)
    assert together.keys() == two_processes.alone.keys()
    scale = max(g.abs().max() for g in two_processes.alone.values())
    for name, gradient in two_processes.alone.items():
        difference = (together[name] - gradient).abs().max()
        assert difference <= 1e-4 * gradient.abs().max() + 1e-6 * scale, name


def test_a_nan_in_one_process_stops_both_and_is_reported(two_processes):
    error = json.loads((two_processes.folder / "error.json").read_text())
    assert error.startswith("iteration 1: ") and "not finite" in error
    report = json.loads((two_processes.folder / "nonfinite_loss.json").read_text())
    assert [len(p["images"]) for p in report["processes"]] == [1, 1]
    files = {x["file_name"] for p in report["processes"] for x in p["images"]}
    assert len(files) == 2
    assert "nan" not in report["processes"][0]["losses"].values()
    assert "nan" in report["processes"][1]["losses"].values()
    assert "Traceback" not in two_processes.output


def test_more_processes_than_gpus_name_both_numbers(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="--num-gpus is 2, but 1 CUDA devices"):
        launch(print, 2, device="cuda")


def test_auto_addresses_are_for_one_machine():
    with pytest.raises(UserError, match="--dist-url"):
        launch(print, 1, device="cpu", num_machines=2)
