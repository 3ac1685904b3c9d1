"""Reading checkpoints of every kind, good, dangerous and broken."""

import argparse
import logging
import pickle

import numpy as np
import pytest
import torch

from solo_d2.checkpoint.load import adapt_to_model, load_weights_file
from solo_d2.errors import UserError

WEIGHTS = {"conv.weight": torch.arange(600.0).view(2, 300), "conv.bias": torch.zeros(2)}


class RunsCode:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def assert_is_weights(checkpoint):
    assert set(checkpoint["model"]) == set(WEIGHTS)
    for name, value in WEIGHTS.items():
        assert torch.equal(checkpoint["model"][name], value)


@pytest.mark.parametrize(
    "content",
    [
        WEIGHTS,
        {"model": WEIGHTS, "iteration": 7},
        {"state_dict": WEIGHTS, "meta": {"epoch": 36}, "optimizer": {}},
        {"state_dict": {f"module.{name}": value for name, value in WEIGHTS.items()}},
    ],
    ids=["bare", "model", "state_dict", "distributed"],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_finds_the_state_dict(tmp_path, content, zipped):
    path = tmp_path / "weights.pth"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    checkpoint = load_weights_file(path)
    assert_is_weights(checkpoint)
    assert checkpoint.get("iteration") == content.get("iteration")


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".pyth", ".pkl", ""])
@pytest.mark.parametrize("kind", ["zip", "before 1.6", "pickle"])
def test_code_is_refused_by_name_and_not_run(tmp_path, suffix, kind):
    path, touched = tmp_path / f"weights{suffix}", tmp_path / "touched"
    content = {"model": WEIGHTS, "x": RunsCode(touched)}
    if kind == "pickle":
        content["model"] = {name: value.numpy() for name, value in WEIGHTS.items()}
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(UserError, match=rf"{path}: .*may run code.*open") as error:
        load_weights_file(path)
    assert "\n" not in str(error.value)
    assert not touched.exists()


def test_harmless_objects_need_the_option_too(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save({"model": WEIGHTS, "args": argparse.Namespace(lr=0.01)}, path)
    with pytest.raises(UserError, match=r"argparse\.Namespace"):
        load_weights_file(path)
    assert_is_weights(load_weights_file(path, allow_pickle=True))


@pytest.mark.parametrize("name", ["R-50.pkl", "R-50.pth", "R-50"])
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("author", ["Detectron2 Model Zoo", None])
def test_model_zoo_arrays_need_no_option(tmp_path, name, protocol, author):
    path = tmp_path / name
    arrays = {name: value.numpy() for name, value in WEIGHTS.items()}
    if author:
        content = {"model": arrays, "__author__": author}
    else:  # Caffe2
        content = {"blobs": {**arrays, "conv.weight_momentum": np.zeros(3)}}
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    checkpoint = load_weights_file(path)
    assert_is_weights(checkpoint)
    assert checkpoint["__author__"] == (author or "Caffe2")
    assert checkpoint.get("matching_heuristics", False) == (author is None)


def test_files_of_pycls_are_read_as_detectron2_reads_them(tmp_path):
    torch.save({"model_state": WEIGHTS, "epoch": 3, "cfg": "text"}, tmp_path / "R-50.pyth")
    checkpoint = load_weights_file(tmp_path / "R-50.pyth")
    assert_is_weights(checkpoint)
    assert checkpoint["matching_heuristics"] and checkpoint["__author__"] == "pycls"


@pytest.mark.parametrize("value", [3, "text", np.array(["a"]), np.array([None]), [1.0]])
def test_what_is_no_tensor_among_tensors_is_named(tmp_path, value):
    path = tmp_path / "weights.pkl"
    arrays = {name: value.numpy() for name, value in WEIGHTS.items()}
    path.write_bytes(pickle.dumps({"model": {**arrays, "odd": value}, "__author__": "me"}))
    with pytest.raises(UserError, match=f"{path}: odd is a {type(value).__name__}, not a tensor"):
        load_weights_file(path)


@pytest.mark.parametrize("odd", [torch.zeros(2).to_sparse(), torch.zeros(2, dtype=torch.cfloat)])
def test_tensors_of_an_unusual_kind_are_named(tmp_path, odd):
    path = tmp_path / "weights.pth"
    torch.save({**WEIGHTS, "odd": odd}, path)
    with pytest.raises(UserError, match=f"{path}: odd is sparse, quantized or complex"):
        load_weights_file(path)


def truncated(path, fraction, **options):
    torch.save(WEIGHTS, path, **options)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * fraction)])


BROKEN = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("hello world\n" * 20),
    "html": lambda path: path.write_text("<!DOCTYPE html><html>404</html>"),
    "half": lambda path: truncated(path, 0.5),
    "half of an old one": lambda path: truncated(path, 0.5, _use_new_zipfile_serialization=False),
    "a list": lambda path: torch.save([1, 2], path),
    "no tensors": lambda path: torch.save({"model": {"epoch": 3}}, path),
    "numbered tensors": lambda path: torch.save({0: torch.zeros(2)}, path),
}


@pytest.mark.parametrize("suffix", ["pth", "pkl"])
@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("allow_pickle", [False, True])
def test_what_is_no_checkpoint_is_one_line(tmp_path, kind, allow_pickle, suffix):
    path = tmp_path / f"weights.{suffix}"
    BROKEN[kind](path)
    with pytest.raises(UserError, match=f"{path}: .*checkpoint") as error:
        load_weights_file(path, allow_pickle=allow_pickle)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth: there is no such file"):
        load_weights_file(tmp_path / "nowhere.pth")


class TestAdaptToModel:
    KEYS = [
        "backbone.bottom_up.stem.conv1.weight",
        "backbone.bottom_up.stem.conv1.norm.running_var",
        "backbone.bottom_up.res2.0.conv1.weight",
        "backbone.bottom_up.res2.0.shortcut.norm.bias",
        "head.category_pred.weight",
    ]
    RESNET = {
        "conv1.weight": 0,
        "bn1.running_var": 1,
        "bn1.num_batches_tracked": 2,
        "layer1.0.conv1.weight": 3,
        "layer1.0.downsample.1.bias": 4,
        "fc.weight": 5,
    }

    def test_torchvision_resnet_goes_to_the_bottom_up(self, caplog):
        with caplog.at_level(logging.INFO, logger="solo_d2"):
            adapted = adapt_to_model(self.RESNET, self.KEYS)
        assert adapted == dict(zip(self.KEYS, [0, 1, 3, 4]))
        (message,) = caplog.messages
        assert "torchvision_resnet" in message and "fc.weight" in message
        assert "num_batches_tracked" not in message

    def test_counters_are_kept_where_the_model_has_them(self):
        key = "backbone.bottom_up.stem.conv1.norm.num_batches_tracked"
        assert adapt_to_model(self.RESNET, [*self.KEYS, key])[key] == 2

    def test_a_bare_backbone_works_too(self):
        keys = [key.removeprefix("backbone.bottom_up.") for key in self.KEYS]
        assert adapt_to_model(self.RESNET, keys)["stem.conv1.weight"] == 0

    def test_published_detectors_are_renamed(self):
        adapted = adapt_to_model(
            {"ins_head.cate_pred.weight": 0, "backbone.bottom_up.stem.conv1.weight": 1}, self.KEYS
        )
        assert adapted == {self.KEYS[-1]: 0, self.KEYS[0]: 1}

    def test_unknown_names_stay_for_the_checkpointer_to_report(self):
        adapted = adapt_to_model({**self.RESNET, "layer9.weight": 6}, self.KEYS)
        assert [name for name in adapted if "layer9" in name] != []

    @pytest.mark.parametrize(
        "weights, keys",
        [
            (dict.fromkeys(KEYS, 0), KEYS),  # our own names
            ({"something.else": 0}, KEYS),
            (RESNET, ["features.0.0.weight"]),  # for another architecture
            (RESNET, list(RESNET)),  # a model that has these names itself
        ],
    )
    def test_everything_else_stays_as_it_is(self, weights, keys):
        assert adapt_to_model(weights, keys) == weights
