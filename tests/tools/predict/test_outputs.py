"""The files written for each format."""

import json
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from detectron2.data.datasets import load_coco_json
from detectron2.data.detection_utils import annotations_to_instances
from PIL import Image
from pycocotools.coco import COCO

from solo_d2.errors import UserError
from solo_d2.images import UnreadableError
from solo_d2.tools.predict import outputs
from solo_d2.tools.predict.command import predict_sources
from solo_d2.tools.predict.inputs import find_sources


def run(predictor, inputs, *chosen):
    folder = chosen[0].folder
    folder.mkdir(parents=True, exist_ok=True)
    sources = find_sources([str(x) for x in inputs], exclude=folder)
    return predict_sources(predictor.predict, sources, chosen)


def pictures(folder, score=0.3):
    return outputs.Pictures(folder, score, color_by="instance", labels=True)


def files_of(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_a_picture_per_image_with_and_without_instances(tmp_path, make_predictor, save_image):
    for name in ("a.png", "sub/a.png", "b.jpg"):
        save_image(tmp_path / "in" / name)
    assert run(make_predictor(), [tmp_path / "in"], pictures(tmp_path / "out")) == []
    assert files_of(tmp_path / "out") == ["a.png", "b.jpg", "sub/a.png"]
    before = np.asarray(Image.open(tmp_path / "in" / "a.png"))
    after = np.asarray(Image.open(tmp_path / "out" / "a.png"))
    assert (after[:9, :14] != before[:9, :14]).any(-1).mean() > 0.9
    assert (after[12:] == before[12:]).all()
    run(make_predictor(empty=True), [tmp_path / "in"], pictures(tmp_path / "none"))
    assert (np.asarray(Image.open(tmp_path / "none" / "a.png")) == before).all()


def test_unreadable_files_are_skipped_and_named_and_the_rest_is_done(
    tmp_path, make_predictor, save_image, capsys
):
    good = save_image(tmp_path / "in" / "z.png")
    (tmp_path / "in" / "text.png").write_text("hello")
    (tmp_path / "in" / "empty.jpg").touch()
    (tmp_path / "in" / "cut.png").write_bytes(good.read_bytes()[:60])
    (tmp_path / "in" / "text.mp4").write_text("hello")
    skipped = run(make_predictor(), [tmp_path / "in"], pictures(tmp_path / "out"))
    names = [Path(line.split(": ")[0]).name for line in skipped]
    assert names == ["cut.png", "empty.jpg", "text.mp4", "text.png"]
    assert files_of(tmp_path / "out") == ["z.png"]
    assert "text.png" in capsys.readouterr().err


def write_clip(path):
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 12.0, (64, 48))
    assert writer.isOpened()
    for i in range(5):
        writer.write(np.full((48, 64, 3), 40 * i, dtype=np.uint8))
    writer.release()


def test_video_frames_are_in_the_json(tmp_path, make_predictor):
    write_clip(tmp_path / "clip.avi")
    results = outputs.CocoResults(tmp_path / "out", 0.3)
    assert run(make_predictor(), [tmp_path / "clip.avi"], results) == []
    images = json.loads((tmp_path / "out" / "images.json").read_text())["images"]
    assert [x["file_name"] for x in images] == [f"clip.avi#{i}" for i in range(5)]


def test_video_is_written_in_h264(tmp_path, make_predictor):
    av = pytest.importorskip("av")
    write_clip(tmp_path / "clip.avi")
    assert run(make_predictor(), [tmp_path / "clip.avi"], pictures(tmp_path / "out")) == []
    with av.open(str(tmp_path / "out" / "clip.avi.mp4")) as container:
        stream = container.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        assert stream.codec_context.name == "h264" and stream.average_rate == 12
    assert len(frames) == 5
    assert frames[0].shape == (48, 64, 3)
    assert np.ptp(frames[2][10, 10].astype(int)) > 30, "a mask has a color"
    assert abs(frames[2][40, 50].astype(int) - 80).max() < 10, "elsewhere the frame is as before"


def test_frames_of_odd_size_are_padded_and_a_change_of_size_is_named(tmp_path):
    av = pytest.importorskip("av")
    writer = outputs.VideoWriter(tmp_path / "odd.mp4", 25.0)
    writer.add(np.full((47, 63, 3), 100, np.uint8))
    with pytest.raises(UnreadableError, match="10 x 12"):
        writer.add(np.zeros((12, 10, 3), np.uint8))
    writer.close()
    with av.open(str(tmp_path / "odd.mp4")) as container:
        (frame,) = container.decode(video=0)
    pixels = frame.to_ndarray(format="rgb24")
    assert pixels.shape == (48, 64, 3)
    assert abs(pixels.astype(int) - 100).max() < 5


def test_videos_without_pyav_are_told_how_to_get_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install av"):
        outputs.check_video_writer()


def test_coco_results_load_with_pycocotools_and_have_all_instances(
    tmp_path, make_predictor, save_image
):
    for name in ("a.png", "b.png"):
        save_image(tmp_path / "in" / name)
    run(make_predictor(), [tmp_path / "in"], outputs.CocoResults(tmp_path / "out", 0.3))
    dataset = COCO(str(tmp_path / "out" / "images.json"))
    results = dataset.loadRes(str(tmp_path / "out" / "coco_results.json"))
    assert [c["name"] for c in dataset.loadCats(dataset.getCatIds())] == ["disc", "bar"]
    assert sorted(results.getImgIds()) == [1, 2]
    first, second = results.loadAnns(results.getAnnIds(imgIds=[1]))
    assert (first["category_id"], second["category_id"]) == (9, 7), "ids of the data set"
    mask = results.annToMask(first)
    assert mask.shape == (20, 30) and mask[:10, :15].all() and mask.sum() == 150


def test_coco_data_set_loads_with_detectron2(tmp_path, make_predictor, save_image):
    for name in ("a.png", "sub/b.png"):
        save_image(tmp_path / "in" / name)
    (tmp_path / "out").mkdir()
    data_set = outputs.CocoDataset(tmp_path / "out", 0.3, (tmp_path / "in").resolve())
    run(make_predictor(), [tmp_path / "in"], data_set)
    records = load_coco_json(str(tmp_path / "out" / "annotations.json"), str(tmp_path / "in"))
    assert [Path(r["file_name"]).exists() for r in records] == [True, True]
    for record in records:
        (annotation,) = record["annotations"]  # instances with scores below 0.3 are omitted
        assert annotation["bbox"] == [0, 0, 15, 10]
        masks = annotations_to_instances([annotation], (20, 30), "bitmask").gt_masks.tensor
        assert masks[0, :10, :15].all() and masks.sum() == 150


def test_id_masks_number_the_instances_by_score(tmp_path, make_predictor, save_image):
    path = save_image(tmp_path / "a.png")
    run(make_predictor(), [path], outputs.IdMasks(tmp_path / "out", 0.05))
    ids = np.asarray(Image.open(tmp_path / "out" / "a.png.masks.png"))
    assert ids.dtype == np.uint8 and ids.shape == (20, 30)
    assert (ids[:10, :15] == 1).all(), "the higher score covers the lower"
    assert ids.sum() == 150
    run(make_predictor(empty=True), [path], outputs.IdMasks(tmp_path / "none", 0.05))
    assert not np.asarray(Image.open(tmp_path / "none" / "a.png.masks.png")).any()


def test_json_has_what_was_done_when_interrupted(tmp_path, make_predictor, save_image):
    for i in range(4):
        save_image(tmp_path / "in" / f"{i}.png")
    predictor = make_predictor()
    count = iter(range(9))

    def predict(image):
        if next(count) == 2:
            raise KeyboardInterrupt
        return predictor.predict(image)

    folder = tmp_path / "out"
    folder.mkdir()
    sources = find_sources([str(tmp_path / "in")], exclude=folder)
    with pytest.raises(KeyboardInterrupt):
        predict_sources(predict, sources, [pictures(folder), outputs.CocoResults(folder, 0.3)])
    assert files_of(folder) == ["0.png", "1.png", "coco_results.json", "images.json"]
    assert len(json.loads((folder / "coco_results.json").read_text())) == 4


def test_label_maps_are_indexed_pictures(tmp_path, make_predictor, save_image):
    labels = np.zeros((20, 30), np.uint8)
    labels[:10, :15] = 2

    def predict(path):
        return replace(make_predictor().predict(path), label_map=labels)

    save_image(tmp_path / "in" / "sub" / "a.jpg")
    sources = find_sources([str(tmp_path / "in")], exclude=tmp_path / "out")
    assert predict_sources(predict, sources, [outputs.LabelMaps(tmp_path / "out", 0.3)]) == []
    assert files_of(tmp_path / "out") == ["sub/a.jpg.labels.png"]
    with Image.open(tmp_path / "out" / "sub" / "a.jpg.labels.png") as image:
        assert image.mode == "P" and np.array_equal(np.asarray(image), labels)
    with pytest.raises(UserError, match="label-maps needs a model that labels pixels"):
        run(make_predictor(), [tmp_path / "in"], outputs.LabelMaps(tmp_path / "none", 0.3))
