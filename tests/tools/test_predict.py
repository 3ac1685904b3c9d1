"""Files in, pictures and COCO json out; every odd image is drawn or named."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import transforms as T
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from PIL import Image
from pycocotools.coco import COCO

from solo_d2 import add_solo_d2_config, predict
from solo_d2.errors import UserError
from solo_d2.tools.predict import Categories, Predictor, UnreadableError

CATEGORIES = Categories(["disc", "bar"], [7, 9])

TINY = """
VERSION: 2
MODEL:
  META_ARCHITECTURE: "SOLOv2"
  DEVICE: "cpu"
  BACKBONE: {NAME: "build_resnet_fpn_backbone"}
  RESNETS:
    DEPTH: 18
    RES2_OUT_CHANNELS: 64
    OUT_FEATURES: ["res2", "res3", "res4", "res5"]
  FPN: {IN_FEATURES: ["res2", "res3", "res4", "res5"], OUT_CHANNELS: 32}
  SOLO: {NUM_CONVS: 1, CONV_DIM: 32, SCORE_THRESH_TEST: 0.0001, MAX_CANDIDATES_TEST: 50}
  SOLOV2: {MASK_DIM: 32, MASK_CONV_DIM: 32}
DATASETS:
  TRAIN: ()
  TEST: ()
INPUT: {MIN_SIZE_TEST: 64, MAX_SIZE_TEST: 96}
"""


class TopLeftModel(torch.nn.Module):
    """Finds one instance of class 1, the top left quarter of any image, and keeps its input."""

    def forward(self, batched_inputs):
        (inputs,) = batched_inputs
        self.seen = inputs["image"]
        height, width = inputs["height"], inputs["width"]
        masks = torch.zeros(1, height, width, dtype=torch.bool)
        masks[:, : max(1, height // 2), : max(1, width // 2)] = True
        boxes = Boxes(torch.tensor([[0.0, 0.0, max(1, width // 2), max(1, height // 2)]]))
        fields = {"pred_masks": masks, "pred_boxes": boxes}
        scores, classes = torch.tensor([0.8]), torch.tensor([1])
        instances = Instances((height, width), **fields, scores=scores, pred_classes=classes)
        return [{"instances": instances}]


class EmptyModel(TopLeftModel):
    def forward(self, batched_inputs):
        (output,) = super().forward(batched_inputs)
        return [{"instances": output["instances"][:0]}]


def make_predictor(model=None, *, min_size=32, max_size=64, input_format="RGB"):
    resize = T.ResizeShortestEdge(min_size, max_size)
    return Predictor(model or TopLeftModel(), resize=resize, input_format=input_format)


def run(inputs, folder, *, model=None, write_json=True):
    sources = predict.find_sources([str(x) for x in inputs], exclude=folder)
    folder.mkdir(exist_ok=True)
    return predict.predict_sources(
        make_predictor(model),
        sources,
        folder,
        categories=CATEGORIES,
        score_threshold=0.5,
        write_json=write_json,
    )


def save(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


def ramp(height=20, width=30, channels=3):
    array = np.arange(height * width * channels, dtype=np.uint8)
    return array.reshape(height, width, channels).squeeze()


def files_of(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


# Reading


def test_rgb_grey_and_rgba_become_three_channels(tmp_path):
    rgb = ramp()
    assert (predict.read_image(save(tmp_path / "a.png", rgb)) == rgb).all()
    assert (predict.read_image(save(tmp_path / "b.png", ramp(channels=4))).shape) == (20, 30, 3)
    gray = predict.read_image(save(tmp_path / "c.png", ramp(channels=1)))
    assert gray.shape == (20, 30, 3) and (gray[..., 0] == ramp(channels=1)).all()


@pytest.mark.parametrize("name", ["gray.png", "gray.tiff"])
def test_16_bit_grey_is_scaled_not_clipped(tmp_path, name):
    array = (np.arange(600, dtype=np.uint16) * 100).reshape(20, 30)
    image = predict.read_image(save(tmp_path / name, array))
    assert (image == (array // 256)[..., None]).all()


@pytest.mark.parametrize("name", ["color.png", "color.tiff"])
def test_16_bit_color_keeps_its_channel_order(tmp_path, name):
    array = np.zeros((20, 30, 3), dtype=np.uint16)
    array[..., 0], array[..., 1] = 60000, 20000  # red, green
    assert cv2.imwrite(str(tmp_path / name), array[..., ::-1])
    image = predict.read_image(tmp_path / name)
    assert np.abs(image.astype(int) - (array // 256)).max() <= 1


def test_exif_rotation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by 90 degrees
    path = save(tmp_path / "turned.jpg", ramp(20, 30), exif=exif)
    assert predict.read_image(path).shape == (30, 20, 3)


def test_float_image_is_refused_by_its_type(tmp_path):
    path = save(tmp_path / "float.tiff", np.ones((4, 5), dtype=np.float32))
    with pytest.raises(UnreadableError, match="float32"):
        predict.read_image(path)


# Predicting


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (8, 20000), (8, 100000), (3000, 2)])
def test_any_ratio_reaches_the_model_with_at_least_one_pixel_a_side(size):
    predictor = make_predictor(min_size=800, max_size=1333)
    instances = predictor(np.zeros((*size, 3), dtype=np.uint8))
    assert instances.image_size == size
    assert min(predictor.model.seen.shape[1:]) >= 1
    assert max(predictor.model.seen.shape[1:]) <= 1333


def test_channel_order_is_the_config_s():
    image = np.zeros((64, 64, 3), dtype=np.uint8)
    image[..., 0] = 200  # red
    for input_format, red in (("RGB", 0), ("BGR", 2)):
        predictor = make_predictor(input_format=input_format)
        predictor(image)
        assert predictor.model.seen[red].min() == 200
        assert predictor.model.seen[2 - red].max() == 0


def test_min_size_0_leaves_the_image_as_it_is():
    predictor = make_predictor(min_size=0)
    predictor(np.zeros((17, 99, 3), dtype=np.uint8))
    assert predictor.model.seen.shape == (3, 17, 99)


# Files


def test_folder_gives_one_picture_per_image_also_in_subfolders(tmp_path):
    images = tmp_path / "in"
    for name in ("a.png", "sub/a.png", "b.jpg"):
        save(images / name, ramp())
    (images / "notes.txt").write_text("no image")
    assert run([images], tmp_path / "out", write_json=False) == []
    assert files_of(tmp_path / "out") == ["a.png", "b.jpg", "sub/a.png"]


def test_image_without_detections_is_written_too(tmp_path):
    path = save(tmp_path / "a.png", ramp())
    assert run([path], tmp_path / "out", model=EmptyModel()) == []
    assert (np.asarray(Image.open(tmp_path / "out" / "a.png")) == ramp()).all()
    assert json.loads((tmp_path / "out" / "coco_results.json").read_text()) == []


def test_same_names_do_not_overwrite_each_other(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    for path in (one / "a.png", two / "a.png", two / "a.tiff", two / "a.PNG", two / "a_2.png"):
        save(path, ramp(), format="PNG")
    files = [str(p) for p in (*sorted(one.iterdir()), *sorted(two.iterdir()))]
    names = predict.output_names(predict.find_sources(files, exclude=tmp_path / "out"))
    assert len(names) == 5
    assert len({str(n).lower() for n in names}) == 5
    assert Path("a.tiff.png") in names


def test_glob_patterns_match_and_repeats_count_once(tmp_path):
    for name in ("a1.png", "a2.png", "b.png"):
        save(tmp_path / name, ramp())
    pattern = str(tmp_path / "a*.png")
    sources = predict.find_sources([pattern, str(tmp_path / "a1.png")], exclude=tmp_path / "out")
    assert [s.path.name for s in sources] == ["a1.png", "a2.png"]


def test_output_folder_within_the_input_is_not_read(tmp_path):
    save(tmp_path / "a.png", ramp())
    for _ in range(2):
        assert run([tmp_path], tmp_path / "out", write_json=False) == []
    assert files_of(tmp_path / "out") == ["a.png"]


def test_input_that_matches_nothing_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none\*\.png"):
        predict.find_sources([str(tmp_path / "none*.png")], exclude=tmp_path / "out")


def test_unreadable_files_are_skipped_and_named_and_the_rest_is_done(tmp_path, capsys):
    good = save(tmp_path / "z.png", ramp())
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "cut.png").write_bytes(good.read_bytes()[:60])
    (tmp_path / "text.mp4").write_text("hello")
    skipped = run([tmp_path], tmp_path / "out")
    assert [Path(s.split(": ")[0]).name for s in skipped] == [
        "cut.png",
        "empty.jpg",
        "text.mp4",
        "text.png",
    ]
    assert files_of(tmp_path / "out") == ["coco_results.json", "images.json", "z.png"]
    assert "text.png" in capsys.readouterr().err


def test_video_in_video_out_with_every_frame_in_the_json(tmp_path):
    path = tmp_path / "clip.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 12.0, (64, 48))
    assert writer.isOpened()
    for i in range(5):
        writer.write(np.full((48, 64, 3), 40 * i, dtype=np.uint8))
    writer.release()
    assert run([path], tmp_path / "out") == []
    capture = cv2.VideoCapture(str(tmp_path / "out" / "clip.avi.mp4"))
    frames = []
    while (read := capture.read())[0]:
        frames.append(read[1])
    assert len(frames) == 5 and frames[0].shape == (48, 64, 3)
    assert capture.get(cv2.CAP_PROP_FPS) == pytest.approx(12, abs=0.1)
    images = json.loads((tmp_path / "out" / "images.json").read_text())["images"]
    assert [x["file_name"] for x in images] == [f"clip.avi#{i}" for i in range(5)]


# COCO json


def test_json_loads_with_pycocotools(tmp_path):
    for name in ("a.png", "b.png"):
        save(tmp_path / "in" / name, ramp(20, 30))
    run([tmp_path / "in"], tmp_path / "out")
    dataset = COCO(str(tmp_path / "out" / "images.json"))
    results = dataset.loadRes(str(tmp_path / "out" / "coco_results.json"))
    assert [c["name"] for c in dataset.loadCats(dataset.getCatIds())] == CATEGORIES.names
    assert sorted(results.getImgIds()) == [1, 2]
    for annotation in results.loadAnns(results.getAnnIds()):
        assert annotation["category_id"] == 9, "the data set's id, not the class number"
        mask = results.annToMask(annotation)
        assert mask.shape == (20, 30)
        assert mask[:10, :15].all() and mask.sum() == 150


def test_json_has_what_was_done_when_interrupted(tmp_path):
    class Interrupted(TopLeftModel):
        calls = 0

        def forward(self, batched_inputs):
            self.calls += 1
            if self.calls == 3:
                raise KeyboardInterrupt
            return super().forward(batched_inputs)

    for i in range(4):
        save(tmp_path / "in" / f"{i}.png", ramp())
    with pytest.raises(KeyboardInterrupt):
        run([tmp_path / "in"], tmp_path / "out", model=Interrupted())
    assert files_of(tmp_path / "out") == ["0.png", "1.png", "coco_results.json", "images.json"]
    assert len(json.loads((tmp_path / "out" / "coco_results.json").read_text())) == 2


# The command


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with tiny.yaml, and weights.pth of that model with two named classes."""
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "tiny.yaml").write_text(TINY)
    cfg = get_cfg()
    add_solo_d2_config(cfg)
    cfg.merge_from_file(str(folder / "tiny.yaml"))
    cfg.MODEL.SOLO.NUM_CLASSES = 2
    torch.manual_seed(0)
    state = build_model(cfg).state_dict()
    # Without training every score is the same 0.01; spread them.
    torch.nn.init.normal_(state["head.category_pred.weight"], std=0.2)
    torch.nn.init.normal_(state["head.kernel_pred.weight"], std=0.2)
    names = {"thing_classes": ["disc", "bar"]}
    torch.save({"model": state, "solo_d2": names}, folder / "weights.pth")
    torch.save({"model": state}, folder / "nameless.pth")
    return folder


@pytest.fixture
def command(tiny, tmp_path):
    """Run the command on the tiny model; it writes to tmp_path / "out"."""

    def run_command(*arguments, weights="weights.pth", config="tiny.yaml"):
        options = ["--config-file", tiny / config, "--weights", tiny / weights]
        options += ["--output", tmp_path / "out", *arguments]
        return predict.main([str(x) for x in options])

    return run_command


def test_command_writes_pictures_and_coco_json(command, tmp_path):
    save(tmp_path / "in" / "a.png", ramp(40, 60))
    save(tmp_path / "in" / "one.png", ramp(1, 1))
    save(tmp_path / "in" / "long.png", ramp(8, 5000))
    assert command(tmp_path / "in", "--json", "--score-threshold", "0.0") == 0
    out = tmp_path / "out"
    assert files_of(out) == ["a.png", "coco_results.json", "images.json", "long.png", "one.png"]
    assert np.asarray(Image.open(out / "long.png")).shape == (8, 5000, 3)
    dataset = COCO(str(out / "images.json"))
    assert [c["name"] for c in dataset.loadCats(dataset.getCatIds())] == ["disc", "bar"]
    results = dataset.loadRes(str(out / "coco_results.json"))
    sizes = {x["id"]: [x["height"], x["width"]] for x in dataset.dataset["images"]}
    assert len(results.anns) > 0
    for annotation in results.anns.values():
        assert annotation["category_id"] in (1, 2)
        assert annotation["segmentation"]["size"] == sizes[annotation["image_id"]]


def test_command_tells_skipped_files_by_exit_code_1(command, tmp_path, capsys):
    save(tmp_path / "in" / "a.png", ramp(40, 60))
    (tmp_path / "in" / "broken.png").write_text("no image")
    assert command(tmp_path / "in") == 1
    assert files_of(tmp_path / "out") == ["a.png"]
    assert "broken.png: not an image" in capsys.readouterr().err


def test_config_overrides_follow_the_inputs(command, tmp_path):
    path = save(tmp_path / "a.png", ramp(40, 60))
    assert command(path, "--json", "MODEL.SOLO.SCORE_THRESH_TEST", "0.999") == 0
    assert json.loads((tmp_path / "out" / "coco_results.json").read_text()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing*.png"], "no image or video matches 'nothing*.png'"),
        (["IMAGE", "MODEL.SOLO.SCORE"], "pairs KEY VALUE: MODEL.SOLO.SCORE"),
        (["IMAGE", "MODEL.SOLO.SCORE", "1"], "MODEL.SOLO.SCORE"),
        (["IMAGE", "MODEL.SOLO.NUM_CLASSES", "5"], "NUM_CLASSES is 5"),
        (["MODEL.DEVICE", "cpu"], "no INPUT"),
    ],
)
def test_usage_errors_are_one_line_and_exit_code_2(command, tmp_path, capsys, arguments, message):
    image = save(tmp_path / "a.png", ramp(40, 60))
    assert command(*[image if x == "IMAGE" else x for x in arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error
    assert not (tmp_path / "out").exists()


def test_class_mismatch_names_both_numbers(command, tmp_path, capsys):
    image = save(tmp_path / "a.png", ramp(40, 60))
    assert command(image, "MODEL.SOLO.NUM_CLASSES", "5") == 2
    error = capsys.readouterr().err
    assert "NUM_CLASSES is 5" in error and "2 classes" in error


def test_checkpoint_without_names_needs_the_number_and_gives_class_numbers(command, tmp_path):
    image = save(tmp_path / "a.png", ramp(40, 60))
    assert command(image, weights="nameless.pth") == 2
    assert command(image, "--json", "MODEL.SOLO.NUM_CLASSES", "2", weights="nameless.pth") == 0
    images = json.loads((tmp_path / "out" / "images.json").read_text())
    assert images["categories"] == [{"id": 1, "name": "0"}, {"id": 2, "name": "1"}]


@pytest.mark.parametrize(("option", "value"), [("weights", "none.pth"), ("config", "none.yaml")])
def test_missing_files_are_named(command, tmp_path, capsys, option, value):
    image = save(tmp_path / "a.png", ramp(40, 60))
    assert command(image, **{option: value}) == 2
    assert value in capsys.readouterr().err


def test_weights_that_run_code_are_refused_by_name(command, tiny, tmp_path, capsys):
    class Trap:
        def __reduce__(self):
            return (Path(tmp_path / "ran").touch, ())

    torch.save({"model": Trap()}, tiny / "trap.pth")
    image = save(tmp_path / "a.png", ramp(40, 60))
    assert command(image, weights="trap.pth") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "trap.pth" in error and "--allow-pickle" in error
    assert not (tmp_path / "ran").exists()


def test_weights_of_another_model_are_one_line(command, tiny, tmp_path, capsys):
    torch.save({"model": {"fc.weight": torch.zeros(3)}}, tiny / "other.pth")
    image = save(tmp_path / "a.png", ramp(40, 60))
    assert command(image, "MODEL.SOLO.NUM_CLASSES", "2", weights="other.pth") == 2
    assert "other.pth" in capsys.readouterr().err.strip().splitlines()[-1]
