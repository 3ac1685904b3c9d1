import logging
import os
import pickle
import signal
import subprocess
import sys

import pytest
import torch
from detectron2.config import get_cfg
from torch import nn

from solo_d2.checkpoint import Checkpointer, build_checkpointer, load_weights_file
from solo_d2.errors import UserError


class Toy(nn.Module):
    def __init__(self, classes=3, background=0):
        super().__init__()
        self.backbone = nn.Sequential(*[nn.Linear(4, 4) for _ in range(6)])
        self.category_pred = nn.Linear(4, classes + background)


class Other(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(*[nn.Linear(4, 4) for _ in range(6)])
        self.roi_heads = nn.Sequential(*[nn.Linear(4, 4) for _ in range(6)])


def names(count):
    return [f"class {i}" for i in range(count)]


def saved(folder, model, classes=None):
    Checkpointer(model, str(folder), thing_classes=classes).save("model", iteration=4)
    return str(folder / "model.pth")


def test_a_saved_model_is_loaded_with_what_belongs_to_it(tmp_path):
    path = saved(tmp_path, Toy(), names(3))
    content = torch.load(path, weights_only=True)
    assert content["solo_d2"] == {"architecture": "Toy", "thing_classes": names(3)}
    model = Toy()
    checkpointer = Checkpointer(model, str(tmp_path), thing_classes=names(3))
    assert checkpointer.get_checkpoint_file() == path
    assert checkpointer.load(path)["iteration"] == 4
    for name, value in content["model"].items():
        assert torch.equal(model.state_dict()[name], value)


def test_an_interrupted_save_leaves_the_old_file(tmp_path):
    path = saved(tmp_path, Toy())
    before = open(path, "rb").read()

    class Unpicklable:
        def state_dict(self):
            return {"a": torch.zeros(1000), "b": lambda: None}

    checkpointer = Checkpointer(Toy(), str(tmp_path), extra=Unpicklable())
    with pytest.raises(Exception, match="pickle"):
        checkpointer.save("model")
    assert open(path, "rb").read() == before
    assert sorted(os.listdir(tmp_path)) == ["last_checkpoint", "model.pth"]


def test_a_kill_while_saving_leaves_the_old_file(tmp_path):
    script = (
        "import os, signal, sys\n"
        "from solo_d2.files import atomic_write\n"
        "with atomic_write(sys.argv[1]) as file:\n"
        "    file.write(b'new')\n"
        "    file.flush()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    path = tmp_path / "file"
    path.write_bytes(b"old")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run([sys.executable, "-c", script, str(path)], env=environment, check=False)
    assert ended.returncode == -signal.SIGKILL
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize("with_metadata", [True, False])
@pytest.mark.parametrize("background", [0, 1])
def test_layers_for_another_number_of_classes_are_left_out_and_named(
    tmp_path, caplog, with_metadata, background
):
    old, new = Toy(80, background), Toy(3, background)
    before = new.category_pred.weight.clone()
    path = saved(tmp_path, old, names(80) if with_metadata else None)
    with caplog.at_level(logging.WARNING):
        Checkpointer(new, thing_classes=names(3)).load(path)
    assert torch.equal(new.backbone[0].weight, old.backbone[0].weight)
    assert torch.equal(new.category_pred.weight, before)
    (message,) = caplog.messages
    assert path in message and "\n" not in message
    assert "the file is for 80 classes, the model for 3" in message
    assert "category_pred.weight" in message and "category_pred.bias" in message


def test_other_shapes_are_named_with_both(tmp_path, caplog):
    model = Toy(7)
    model.backbone[2] = nn.Linear(4, 5)
    path = saved(tmp_path, model)
    with caplog.at_level(logging.WARNING):
        Checkpointer(Toy(7), thing_classes=names(7)).load(path)
    assert "backbone.2.bias (5,) instead of (4,)" in caplog.text
    assert "classes" not in caplog.text


def test_the_backbone_of_another_detector_is_taken(tmp_path, caplog):
    other, model = Other(), Toy()
    path = saved(tmp_path, other)
    with caplog.at_level(logging.WARNING):
        Checkpointer(model).load(path)
    assert torch.equal(model.backbone[5].weight, other.backbone[5].weight)
    (message,) = caplog.messages
    assert "not in the file: 2 of category_pred" in message
    assert "not in the model: 12 of roi_heads" in message


@pytest.mark.parametrize("layers", [0, 2])
def test_another_architecture_is_one_line_with_both(tmp_path, layers):
    """No head tensor fits, and less than half of the backbone."""
    state = Other().state_dict()
    state = {
        (
            name if name.startswith(tuple(f"backbone.{i}." for i in range(layers))) else f"x.{name}"
        ): x
        for name, x in state.items()
    }
    torch.save({"model": state, "solo_d2": {"architecture": "Other"}}, tmp_path / "foreign.pth")
    with pytest.raises(UserError, match="saved from Other. are not for Toy") as caught:
        Checkpointer(Toy()).load(str(tmp_path / "foreign.pth"))
    assert "foreign.pth" in str(caught.value) and "\n" not in str(caught.value)


class TestCompleteness:
    """Prediction, evaluation and resuming need every tensor of the model."""

    def test_a_complete_file_is_loaded(self, tmp_path):
        path = saved(tmp_path, Toy())
        assert Checkpointer(Toy(), require_complete=True).load(path)["iteration"] == 4

    def test_missing_parameters_are_named(self, tmp_path):
        path = saved(tmp_path, Other())
        with pytest.raises(UserError, match=r"lacks category_pred\.weight, category_pred\.bias"):
            Checkpointer(Toy(), require_complete=True).load(path)

    def test_missing_statistics_are_named(self, tmp_path):
        model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1))
        state = model.state_dict()
        del state["1.running_var"], state["1.num_batches_tracked"]
        torch.save(state, tmp_path / "model.pth")
        with pytest.raises(UserError, match=r"lacks 1\.running_var$"):
            Checkpointer(model, require_complete=True).load(str(tmp_path / "model.pth"))

    def test_another_number_of_classes_is_an_error_with_both(self, tmp_path):
        path = saved(tmp_path, Toy(80), names(80))
        with pytest.raises(UserError, match="is for 80 classes, the model for 3") as caught:
            Checkpointer(Toy(3), thing_classes=names(3), require_complete=True).load(path)
        assert path in str(caught.value) and "\n" not in str(caught.value)

    def test_no_file_is_an_error(self):
        with pytest.raises(UserError, match="no weights"):
            Checkpointer(Toy(), require_complete=True).load("")

    def test_resuming_needs_all_but_a_mere_start_does_not(self, tmp_path):
        old, new = Toy(80), Toy(3)
        optimizer = torch.optim.SGD(old.parameters(), lr=0.1)
        Checkpointer(old, str(tmp_path), optimizer=optimizer).save("model")
        optimizer = torch.optim.SGD(new.parameters(), lr=0.1)
        checkpointer = Checkpointer(new, str(tmp_path), optimizer=optimizer)
        with pytest.raises(UserError, match="do not fit"):
            checkpointer.resume_or_load("", resume=True)
        checkpointer.resume_or_load(str(tmp_path / "model.pth"), resume=False)
        assert torch.equal(new.backbone[0].weight, old.backbone[0].weight)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("require_complete", [False, True])
def test_weights_that_are_not_finite_are_named(tmp_path, value, require_complete):
    state = Toy().state_dict()
    state["backbone.3.weight"][2, 1] = value
    torch.save(state, tmp_path / "model.pth")
    with pytest.raises(UserError, match=r"model\.pth: .* in backbone\.3\.weight$"):
        Checkpointer(Toy(), require_complete=require_complete).load(str(tmp_path / "model.pth"))


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    path = saved(tmp_path, Toy())
    before = open(path, "rb").read()
    model = Toy()
    with torch.no_grad():
        model.category_pred.bias[1] = float("nan")
    with pytest.raises(UserError, match=r"model\.pth is not written: .*category_pred\.bias"):
        saved(tmp_path, model)
    assert open(path, "rb").read() == before


@pytest.mark.parametrize(
    "entries, complaint",
    [
        ({"solo_d2": [1]}, "its solo_d2 is of type list, not dict"),
        ({"solo_d2": {"thing_classes": "cat"}}, "its thing_classes is of type str, not list"),
        ({"solo_d2": {"thing_classes": ["cat", 3]}}, "its class name is of type int, not str"),
        ({"solo_d2": {"architecture": 7}}, "its architecture is of type int, not str"),
        ({"iteration": "seven"}, "its iteration is of type str, not int"),
        ({"optimizer": {"state": {}}}, "its 'optimizer' is not from this training run"),
        ({"optimizer": None}, "its optimizer is of type NoneType, not dict"),
        ({"optimizer": {"state": 3}}, "its optimizer.state is of type int, not dict"),
        ({"optimizer": {"param_groups": []}}, "its optimizer.param_groups has 0 entries, not 1"),
        (
            {"optimizer": {"param_groups": [{"lr": "x"}]}},
            r"its optimizer.param_groups\[0\].lr is of type str, not float",
        ),
    ],
)
def test_wrong_types_beside_the_tensors_are_one_line(tmp_path, entries, complaint):
    path = str(tmp_path / "model.pth")
    torch.save({"model": Toy().state_dict(), **entries}, path)
    model = Toy()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(UserError, match=complaint) as caught:
        Checkpointer(model, optimizer=optimizer).load(path)
    assert path in str(caught.value) and "\n" not in str(caught.value)


def test_a_pointer_to_the_last_checkpoint_that_is_not_text_is_one_line(tmp_path):
    (tmp_path / "last_checkpoint").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="last_checkpoint does not hold the name of a checkpoint"):
        Checkpointer(Toy(), str(tmp_path)).resume_or_load("", resume=True)


def test_backbone_files_are_loaded(tmp_path):
    path = tmp_path / "imagenet.pth"
    state = {f"backbone.{k}": v for k, v in Toy().backbone.state_dict().items()}
    torch.save({**state, "fc.weight": torch.zeros(10, 4), "fc.bias": torch.zeros(10)}, path)
    model = Toy()
    Checkpointer(model).load(str(path))
    assert torch.equal(model.backbone[5].weight, state["backbone.5.weight"])


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".pyth", ".pkl", ""])
def test_files_with_code_are_refused_unless_allowed(tmp_path, suffix):
    path = tmp_path / f"code{suffix}"
    torch.save({"model": Toy().state_dict(), "hook": os.getcwd}, path)
    with pytest.raises(UserError, match=r"code.*getcwd"):
        Checkpointer(Toy()).load(str(path))
    Checkpointer(Toy(), allow_pickle=True).load(str(path))


def test_a_missing_file_is_named_and_no_file_is_no_error(tmp_path):
    checkpointer = Checkpointer(Toy(), str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"nothing\.pth"):
        checkpointer.load(str(tmp_path / "nothing.pth"))
    assert checkpointer.load("") == {}
    assert not checkpointer.has_checkpoint()
    assert checkpointer.resume_or_load("", resume=True) == {}


@pytest.mark.parametrize("query", [False, True])
def test_names_of_detectron2s_old_zoo_are_matched_on_request(tmp_path, query):
    """As in Detectron2: by suffix, if the pickle or the path asks for it."""
    state = {name: value.numpy() for name, value in Toy().state_dict().items()}
    path = tmp_path / "zoo.pkl"
    content = {"model": state, "__author__": "somebody", "matching_heuristics": not query}
    path.write_bytes(pickle.dumps(content))
    model = nn.ModuleDict({"new": Toy()})
    Checkpointer(model).load(f"{path}?matching_heuristics=True" if query else str(path))
    assert model["new"].category_pred.bias.tolist() == state["category_pred.bias"].tolist()


def test_the_classes_of_the_data_are_saved(tmp_path):
    cfg = get_cfg()
    cfg.OUTPUT_DIR = str(tmp_path)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = [object()], ["coco_2017_val"]
    build_checkpointer(cfg, Toy()).save("model")
    checkpoint = load_weights_file(tmp_path / "model.pth")
    assert len(checkpoint["solo_d2"]["thing_classes"]) == 80


def test_renamed_classes_are_warned_about(tmp_path, caplog):
    path = saved(tmp_path, Toy(), names(3))
    with caplog.at_level(logging.WARNING):
        Checkpointer(Toy(), thing_classes=["cat", "dog", "cow"]).load(path)
    assert "class 0" in caplog.text and "cow" in caplog.text
