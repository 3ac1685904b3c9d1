"""ONNX files in onnxruntime against the models that they were exported from."""

import numpy as np
import pytest
import torch

from solo_d2 import load
from solo_d2.errors import UserError
from solo_d2.export.check import compare, raw_instances
from solo_d2.export.exported import ExportedAdaptIS, open_exported
from solo_d2.export.files import FORMATS, build_graph, export, round_weights
from solo_d2.export.metadata import decoder_path

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

DETECTORS = ["SOLO", "DecoupledSOLO", "SOLOv2 DCN", "YOLACT++", "YOLACT square", "CenterMask"]
# The traced size is 288 x 352; one side of 32 is a single cell at the coarsest level.
SIZES = [(64, 96), (150, 70), (320, 416), (32, 40)]


class File:
    """A model, its file, and images."""

    def __init__(self, tiny, name, folder):
        self.model = tiny.model(name)
        self.scenes = None if name.startswith("AdaptIS") else tiny.Scenes(self.model)
        self.graph = build_graph(self.model)
        self.path = folder / "model.onnx"
        self.files = export(self.graph, tiny.metadata(self.graph), self.path)
        self.exported = open_exported(self.path)

    def compare(self, image, **options):
        return compare(
            raw_instances(self.model, image), raw_instances(self.exported, image), **options
        )


@pytest.fixture(scope="module", params=DETECTORS)
def detector(request, tiny, tmp_path_factory):
    return File(tiny, request.param, tmp_path_factory.mktemp("onnx"))


@pytest.fixture(scope="module")
def adaptis(tiny, tmp_path_factory):
    return File(tiny, "AdaptIS cityscapes", tmp_path_factory.mktemp("onnx"))


def input_sizes(path):
    (image,) = [x for x in onnx.load(path).graph.input if x.name == "image"]
    return [x.dim_param or x.dim_value for x in image.type.tensor_type.shape.dim]


def test_the_file_finds_the_same_at_any_size(detector, tiny):
    batch, channels, *sides = input_sizes(detector.path)
    assert (batch, channels) == (1, 3)
    assert all(isinstance(side, str) for side in sides), "a frozen size"
    for size in SIZES:
        found = detector.compare(tiny.noise(size))
        assert found.equal and found.eager > 0, (size, found)
        assert found.differing_pixels <= 2 * found.matched, (size, found)


def test_nothing_few_and_many_are_ordinary(detector):
    scenes = detector.scenes
    none, few, many = scenes.found
    assert none == 0 < few <= 3 < many
    assert detector.compare(scenes.none).exported == 0
    assert detector.compare(scenes.many).equal
    # the one candidate is at the threshold, within float noise of it
    assert detector.compare(scenes.few).exported in (0, few)


def test_the_file_alone_predicts(detector, tiny):
    predictor = load(detector.path)
    assert predictor.names == ["disc", "square", "star"]
    assert predictor.category_ids == [7, 8, 9]
    assert predictor.input_format == "RGB"
    pixels = tiny.noise((120, 150)).byte().permute(1, 2, 0).numpy()
    result = predictor.predict(np.ascontiguousarray(pixels))
    inputs = {"image": predictor.network_input(pixels), "height": 120, "width": 150}
    with torch.no_grad():
        expected = detector.model([inputs])[0]["instances"]
    assert len(result.instances) == len(expected) > 0
    assert set(result.instances.get_fields()) == set(expected.get_fields())
    assert result.instances.pred_masks.shape == expected.pred_masks.shape
    differing = (result.instances.pred_masks ^ expected.pred_masks).sum()
    assert differing <= 2 * len(expected)
    boxes = result.instances.pred_boxes.tensor, expected.pred_boxes.tensor
    assert (boxes[0] - boxes[1]).abs().max() <= 1
    assert all("category_id" in x and x["category_id"] in (7, 8, 9) for x in result.to_coco())


def test_the_file_tells_nothing_about_the_machine(detector):
    content = detector.path.read_bytes()
    assert b"site-packages" not in content and b"solo_d2/modeling" not in content


def test_adaptis_answers_points_and_searches(adaptis, tiny):
    assert adaptis.files == [adaptis.path, decoder_path(adaptis.path)]
    assert all(isinstance(side, str) for side in input_sizes(adaptis.path)[2:])
    for size in SIZES:
        found = adaptis.compare(tiny.noise(size), in_order=True)
        assert found.equal and found.eager == 25, (size, found)
    predictor = load(adaptis.path)
    assert isinstance(predictor.model, ExportedAdaptIS) and predictor.takes_points
    pixels = tiny.noise((90, 120)).byte().permute(1, 2, 0).numpy()
    predictor.set_image(pixels)
    assert len(predictor.click([[5, 7], [60, 40]]).instances) == 2
    inputs = [{"image": tiny.noise((90, 120)), "height": 45, "width": 60}]
    (eager,), (exported,) = adaptis.model(inputs), adaptis.exported(inputs)
    torch.testing.assert_close(eager["sem_seg"], exported["sem_seg"], rtol=0, atol=1e-5)
    assert len(eager["instances"]) == len(exported["instances"])


def test_one_size_and_half_weights(tiny, tmp_path):
    model = tiny.model("YOLACT square")
    graph = build_graph(model)
    round_weights(model)
    sizes = {}
    for half in (False, True):
        path = tmp_path / f"{half}.onnx"
        export(graph, tiny.metadata(graph, size=(60, 80)), path, half=half)
        sizes[half] = path.stat().st_size
    assert sizes[True] < 0.75 * sizes[False]
    assert input_sizes(path) == [1, 3, 60, 80]
    predictor = load(path)
    image = predictor.network_input(tiny.noise((100, 90)).byte().permute(1, 2, 0).numpy())
    assert image.shape == (3, 60, 80)
    found = compare(raw_instances(model, image), raw_instances(predictor.model, image))
    assert found.equal and found.eager > 0


def unet(tiny):
    """The U-Net crops its maps by amounts that depend on the image's size."""
    backbone = {
        "BACKBONE__NAME": "build_adaptis_unet_backbone",
        "UNET__LEVELS": 3,
        "UNET__WIDTH": 4,
    }
    options = {"ADAPTIS__IN_FEATURES": ["unet"], "ADAPTIS__HEAD": "toy"} | backbone
    return tiny.model("AdaptIS", **{f"MODEL__{key}": value for key, value in options.items()})


def test_a_network_that_depends_on_the_size_needs_one(tiny, tmp_path):
    graph = build_graph(unet(tiny))
    with pytest.raises(UserError, match="--size H W"):
        export(graph, tiny.metadata(graph), tmp_path / "model.onnx")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("format", FORMATS)
def test_with_one_it_answers_points_and_searches(tiny, tmp_path, format):
    model = unet(tiny)
    graph, path = build_graph(model), tmp_path / f"model{FORMATS[format]}"
    # odd, so that maps are cropped
    export(graph, tiny.metadata(graph, size=(45, 62)), path, format=format)
    exported = open_exported(path, allow_pickle=True)
    image = tiny.noise((45, 62))
    found = compare(raw_instances(model, image), raw_instances(exported, image), in_order=True)
    assert found.equal and found.eager == 25
    (eager,), (output,) = model([{"image": image}]), exported([{"image": image}])
    assert torch.equal(eager["panoptic_seg"][0], output["panoptic_seg"][0])
    # smaller images are padded
    assert exported([{"image": tiny.noise((40, 50))}])[0]["panoptic_seg"][0].shape == (40, 50)
    with pytest.raises(UserError, match="takes 45 x 62 pixels"):
        exported([{"image": tiny.noise((46, 62))}])


def test_what_is_no_exported_file_is_one_line(tmp_path):
    bad = tmp_path / "bad.onnx"
    bad.write_bytes(b"nothing")
    foreign = tmp_path / "foreign.onnx"
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    node = onnx.helper.make_node("Identity", ["x"], ["y"])
    result = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph([node], "g", [value], [result])
    opset = [onnx.helper.make_opsetid("", 20)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=9), foreign)
    (tmp_path / "model.pt2").write_bytes(b"")
    for path, message in (
        (tmp_path / "none.onnx", "no such file"),
        (bad, "onnxruntime cannot read it"),
        (foreign, "no file of solo_d2 export"),
        (tmp_path / "model.pt2", "may run code"),
    ):
        with pytest.raises(UserError, match=message) as error:
            load(path)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="exported with its config"):
        load("SOLOv2/SOLOv2_R50_3x.yaml", weights=bad)
