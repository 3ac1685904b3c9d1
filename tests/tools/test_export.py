"""solo-d2 export, from a config and weights to a file that predicts."""

import contextlib
import io

import numpy as np
import pytest
import torch
from PIL import Image

from solo_d2 import load
from solo_d2.tools import export, predict

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

# A small model with a fixed input size, so that its export takes seconds.
OPTIONS = {
    "MODEL.META_ARCHITECTURE": "YOLACT",
    "MODEL.BACKBONE.NAME": "build_mobilenetv2_backbone",
    "MODEL.MOBILENETV2.WIDTH_MULT": 0.25,
    "MODEL.MOBILENETV2.NORM": "BN",
    "MODEL.MOBILENETV2.OUT_FEATURES": "['res3', 'res4', 'res5']",
    "MODEL.YOLACT.INPUT_SIZE": 96,
    "MODEL.YOLACT.CONV_DIM": 8,
    "MODEL.YOLACT.NUM_PROTOTYPES": 4,
    "MODEL.YOLACT.ANCHOR_SIZES": "[12, 24, 48, 96, 192]",
    "MODEL.YOLACT.NUM_CLASSES": 2,
    "MODEL.YOLACT.SCORE_THRESH_TEST": 0.01,
    "DATASETS.TRAIN": "()",
    "DATASETS.TEST": "()",
}
WORDS = [str(x) for item in OPTIONS.items() for x in item]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with a config and a checkpoint that finds something, as training leaves it."""
    from detectron2.modeling import build_model

    from solo_d2.config import load_config

    folder = tmp_path_factory.mktemp("run")
    cfg = load_config(opts=[*WORDS, "MODEL.DEVICE", "cpu"])
    torch.manual_seed(0)
    model = build_model(cfg)
    torch.nn.init.normal_(model.head.class_logits.weight, std=0.3)
    (folder / "config.yaml").write_text(cfg.dump())
    stored = {"thing_classes": ["cat", "dog"]}
    torch.save({"model": model.state_dict(), "solo_d2": stored}, folder / "model_final.pth")
    pixels = np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "photo.png")
    return folder


@pytest.fixture(scope="module")
def exported(run):
    """The file, and what the command printed about it."""
    path, printed = run / "model.onnx", io.StringIO()
    words = ["--weights", str(run), "--output", str(path), "--size", "96", "96"]
    with contextlib.redirect_stdout(printed):
        assert export.main([*words, "--image", str(run / "photo.png")]) == 0
    return path, printed.getvalue()


@pytest.fixture
def file(exported):
    return exported[0]


def test_it_compares_the_file_with_the_model(exported):
    path, printed = exported
    title, figures = printed.splitlines()[-2:]
    assert title.split()[:3] == ["eager", "exported", "matched"]
    eager, others, matched = map(int, figures.split()[:3])
    assert eager == others == matched > 0
    assert f"{path.stat().st_size / 1e6:.1f} MB" in printed


def test_a_file_that_differs_is_told_by_the_exit_code(run, file, monkeypatch, capsys):
    written = export.export

    def write_then_change(graph, *arguments, **options):
        files = written(graph, *arguments, **options)
        with torch.no_grad():
            graph.model.head.class_logits.bias += 1.5 * torch.arange(9)
        return files

    monkeypatch.setattr(export, "export", write_then_change)
    output = str(run / "other.onnx")
    assert export.main(["--weights", str(run), "--output", output, "--size", "96", "96"]) == 1
    assert "differ by more than float noise" in capsys.readouterr().err


def test_predict_runs_the_file(run, file, tmp_path):
    words = ["--weights", str(file), "--format", "coco-results", "--output", str(tmp_path)]
    assert predict.main([*words, str(run / "photo.png")]) == 0
    assert (tmp_path / "coco_results.json").stat().st_size > 10


def test_the_torch_format_needs_trust_and_predicts_the_same(run, file, tmp_path):
    path = tmp_path / "model.pt2"
    words = ["--weights", str(run), "--format", "torch", "--output", str(path)]
    assert export.main([*words, "--size", "96", "96"]) == 0
    results = [load(x, allow_pickle=True).predict(run / "photo.png") for x in (path, file)]
    assert results[0].names == ["cat", "dog"]
    a, b = (x.instances for x in results)
    assert len(a) == len(b) > 0
    torch.testing.assert_close(a.scores, b.scores, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--output", "model.pth"], "ends in .onnx"),
        (["--output", "model.onnx", "--size", "96"], "neither H W"),
        (["--output", "model.pt2", "--format", "torch", "--half"], "--half is for"),
        (["--output", "m.onnx", "MODEL.YOLACT.NMS_TYPE", "traditional"], "'traditional'"),
    ],
)
def test_a_wrong_command_is_one_line_before_any_work(run, words, message, capsys):
    assert export.main(["--weights", str(run), *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
