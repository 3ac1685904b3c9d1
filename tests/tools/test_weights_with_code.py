"""No command runs code from a file that it is given as weights, whatever its suffix."""

import pickle
from pathlib import Path

import pytest
import torch
from PIL import Image

import solo_d2
from solo_d2.errors import UserError
from solo_d2.tools import benchmark, click, convert, predict, train
from solo_d2.tools.compare import cli as compare

SOLO, ADAPTIS = "quick/solov2_shapes.yaml", "quick/adaptis_mobilenetv2_shapes_stage2.yaml"
SMALL = "MODEL.DEVICE cpu DATASETS.SHAPES.TRAIN_IMAGES 2 DATASETS.SHAPES.VAL_IMAGES 1".split()


@pytest.fixture(scope="module", autouse=True)
def shapes_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOLO_D2_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


class RunsCode:
    def __init__(self, touched):
        self.touched = touched

    def __reduce__(self):
        return Path.touch, (self.touched,)


SUFFIXES = [".pth", ".pt", ".pyth", ".pkl", ""]
COMMANDS = ["train", "evaluate", "resume", "predict", "benchmark", "convert", "click"]
CASES = [(command, suffix) for command in COMMANDS for suffix in SUFFIXES]
# it starts a process, in which it reads the file as evaluate does
CASES += [("compare", ".pyth"), ("compare", ".pkl")]


@pytest.fixture(params=SUFFIXES)
def hostile(request, tmp_path):
    """(file, what exists if code was run): of torch.save, or a plain pickle under its suffix."""
    file, touched = tmp_path / f"hostile{request.param}", tmp_path / "touched"
    content = {"model": {"weight": torch.zeros(1)}, "trap": RunsCode(touched)}
    if request.param == ".pkl":
        file.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, file)
    return file, touched


def words_of(command, file, folder):
    """The command line that has the file for weights."""
    image = folder / "image.png"
    Image.new("RGB", (32, 32)).save(image)
    size = ["--size", "32", "32", "--instances", "1"]
    (folder / "run").mkdir()
    (folder / "run" / "last_checkpoint").write_text(str(file))
    run = ["OUTPUT_DIR", str(folder / "run")]
    return {
        "train": ["--config-file", SOLO, "--overwrite", *SMALL, *run, "MODEL.WEIGHTS", file],
        "evaluate": ["--config-file", SOLO, "--eval-only", *SMALL, *run, "MODEL.WEIGHTS", file],
        "resume": ["--config-file", SOLO, "--resume", *SMALL, *run],
        "predict": ["--config-file", SOLO, "--weights", file, "--output", folder / "out", image],
        "benchmark": ["--config-file", SOLO, "--weights", file, *size, *SMALL],
        "convert": [file, folder / "out.pth"],
        "click": ["--config-file", ADAPTIS, "--weights", file, *SMALL],
        "compare": [SOLO, "--weights", file, "--output", folder / "out", *SMALL],
    }[command]


@pytest.mark.parametrize(("command", "hostile"), CASES, indirect=["hostile"])
def test_it_is_refused_with_the_option_that_the_command_has(command, hostile, tmp_path, capfd):
    file, touched = hostile
    main = {
        "predict": predict.main,
        "benchmark": benchmark.main,
        "convert": convert.main,
        "click": click.main,
        "compare": compare.main,
    }.get(command, train.main)
    assert main([str(word) for word in words_of(command, file, tmp_path)]) in (1, 2)
    lines = [x for x in capfd.readouterr().err.splitlines() if x.startswith("error: ")]
    assert len(lines) == 1 and str(file) in lines[0] and "may run code" in lines[0]
    assert not touched.exists()
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    has_option = "--allow-pickle" in capfd.readouterr().out
    assert has_option == ("--allow-pickle" in lines[0])


def test_load_refuses_it(hostile):
    file, touched = hostile
    with pytest.raises(UserError, match=rf"{file}: .* may run code"):
        solo_d2.load(SOLO, weights=file)
    assert not touched.exists()
