import logging
import os
import signal
import subprocess
import sys

import pytest
import torch
from torch import nn

from solo_d2.checkpoint.checkpointer import Checkpointer
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


def test_best_checkpoints_are_not_resumed_from(tmp_path):
    saved(tmp_path, Toy())
    Checkpointer(Toy(), str(tmp_path), tag_last=False).save("model_best")
    assert (tmp_path / "last_checkpoint").read_text() == "model.pth"


@pytest.mark.parametrize("with_metadata", [True, False])
@pytest.mark.parametrize("background", [0, 1])
def test_another_number_of_classes_is_one_line_with_both(tmp_path, with_metadata, background):
    path = saved(tmp_path, Toy(80, background), names(80) if with_metadata else None)
    with pytest.raises(UserError, match="are for 80 classes, the model has 3") as caught:
        Checkpointer(Toy(3, background), thing_classes=names(3)).load(path)
    assert path in str(caught.value) and "\n" not in str(caught.value)


def test_on_request_the_layers_that_fit_are_taken(tmp_path, caplog):
    old, new = Toy(80), Toy(3)
    path = saved(tmp_path, old, names(80))
    with caplog.at_level(logging.WARNING):
        Checkpointer(new, thing_classes=names(3), skip_mismatched=True).load(path)
    assert torch.equal(new.backbone[0].weight, old.backbone[0].weight)
    assert "category_pred.weight" in caplog.text


def test_tensors_that_do_not_fit_are_named(tmp_path):
    model = Toy()
    model.backbone[2] = nn.Linear(4, 5)
    path = saved(tmp_path, model)
    with pytest.raises(UserError, match=r"backbone\.2\.bias: \(5,\) in the file, \(4,\) in the"):
        Checkpointer(Toy()).load(path)


def test_another_architecture_is_one_line_with_both(tmp_path):
    path = saved(tmp_path, Other())
    with pytest.raises(UserError, match="are of architecture Other, the model is Toy") as caught:
        Checkpointer(Toy()).load(path)
    assert path in str(caught.value)


@pytest.mark.parametrize("same_backbone", [True, False])
def test_without_metadata_it_is_told_by_its_names(tmp_path, same_backbone):
    path = tmp_path / "foreign.pth"
    state = Other().state_dict()
    if not same_backbone:
        state = {f"x.{name}": value for name, value in list(state.items())[:3]}
    torch.save({"model": state}, path)
    with pytest.raises(UserError, match="not of architecture Toy") as caught:
        Checkpointer(Toy()).load(str(path))
    missing = "category_pred.weight" if same_backbone else "backbone.0.weight"
    assert "foreign.pth" in str(caught.value) and f"first {missing})" in str(caught.value)


def test_backbone_files_are_loaded(tmp_path):
    path = tmp_path / "imagenet.pth"
    state = {f"backbone.{k}": v for k, v in Toy().backbone.state_dict().items()}
    torch.save({**state, "fc.weight": torch.zeros(10, 4), "fc.bias": torch.zeros(10)}, path)
    model = Toy()
    Checkpointer(model).load(str(path))
    assert torch.equal(model.backbone[5].weight, state["backbone.5.weight"])


def test_files_with_code_are_refused_unless_allowed(tmp_path):
    path = tmp_path / "code.pth"
    torch.save({"model": Toy().state_dict(), "hook": os.getcwd}, path)
    with pytest.raises(UserError, match=r"code\.pth"):
        Checkpointer(Toy()).load(str(path))
    Checkpointer(Toy(), allow_pickle=True).load(str(path))


def test_a_missing_file_is_named_and_no_file_is_no_error(tmp_path):
    checkpointer = Checkpointer(Toy(), str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"nothing\.pth"):
        checkpointer.load(str(tmp_path / "nothing.pth"))
    assert checkpointer.load("") == {}
    assert not checkpointer.has_checkpoint()
    assert checkpointer.resume_or_load("", resume=True) == {}


def test_renamed_classes_are_warned_about(tmp_path, caplog):
    path = saved(tmp_path, Toy(), names(3))
    with caplog.at_level(logging.WARNING):
        Checkpointer(Toy(), thing_classes=["cat", "dog", "cow"]).load(path)
    assert "class 0" in caplog.text and "cow" in caplog.text
