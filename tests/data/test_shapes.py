"""The embedded data set: correct masks, reproducible pictures, complete or absent."""

import contextlib
import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
from collections import Counter

import cv2
import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import annotations_to_instances, read_image
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Instances
from pycocotools.coco import COCO

from solo_d2.data import SHAPES, cache, scenes, shapes

SIZE = (128, 128)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("shapes")
    SHAPES.generate(root, count=250, size=SIZE, seed=3, split="train")
    return root


@pytest.fixture(scope="module")
def coco(root):
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(str(root / "annotations" / "instances_train.json"))


@pytest.fixture
def cache_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("SOLO_D2_CACHE", str(tmp_path / "cache"))
    yield tmp_path / "cache"
    monkeypatch.undo()
    SHAPES.register()


def scene(index, seed=3, size=SIZE):
    return scenes.draw_scene(np.random.default_rng([seed, index]), *size)


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# --- determinism


def test_same_parameters_give_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        SHAPES.generate(tmp_path / name, count=4, size=(64, 96), seed=1, split="val")
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert len(files(tmp_path / "a")) == 5


def test_an_image_does_not_depend_on_the_count(tmp_path, root, coco):
    SHAPES.generate(tmp_path, count=3, size=SIZE, seed=3, split="train")
    few = files(tmp_path / "train")
    assert len(few) == 3
    assert few == {name: (root / "train" / name).read_bytes() for name in few}
    annotations = json.loads((tmp_path / "annotations/instances_train.json").read_text())
    assert annotations["annotations"] == coco.loadAnns(coco.getAnnIds(imgIds=[1, 2, 3]))


@pytest.mark.parametrize("other", [{"seed": 4}, {"split": "val"}])
def test_seed_and_split_change_the_images(tmp_path, root, other):
    parameters = {"count": 2, "size": SIZE, "seed": 3, "split": "train"} | other
    SHAPES.generate(tmp_path, **parameters)
    for image in (tmp_path / parameters["split"]).iterdir():
        assert image.read_bytes() != (root / "train" / image.name).read_bytes()


@pytest.mark.parametrize(
    "wrong", [{"count": 0}, {"size": (192, 16)}, {"seed": -1}], ids=["count", "size", "seed"]
)
def test_parameters_out_of_range_are_refused(tmp_path, wrong):
    parameters = {"count": 1, "size": (64, 64), "seed": 0, "split": "train"} | wrong
    with pytest.raises(ValueError, match="shapes need at least 1 image"):
        SHAPES.generate(tmp_path, **parameters)


# --- content of the json


def test_ids_start_at_one_and_categories_are_not_contiguous(coco):
    assert coco.getImgIds() == list(range(1, 251))
    assert coco.getAnnIds() == list(range(1, len(coco.anns) + 1))
    names = {c["name"]: c["id"] for c in coco.dataset["categories"]}
    assert names == SHAPES.category_ids
    assert len(names) >= 5
    assert max(names.values()) > len(names)
    counts = Counter(a["category_id"] for a in coco.dataset["annotations"])
    assert set(counts) == set(names.values())
    assert min(counts.values()) > 0.5 * max(counts.values())


def test_images_have_the_size_that_the_json_says(root, coco):
    for image in coco.loadImgs([1, 2, 3]):
        pixels = read_image(str(root / "train" / image["file_name"]), "BGR")
        assert pixels.shape == (image["height"], image["width"], 3) == (*SIZE, 3)


def test_area_and_box_are_those_of_the_segmentation(coco):
    for annotation in coco.dataset["annotations"]:
        mask = coco.annToMask(annotation)
        y, x = np.nonzero(mask)
        assert annotation["area"] == mask.sum() >= scenes.MIN_PIXELS * 0.9
        box = [x.min(), y.min(), np.ptp(x) + 1, np.ptp(y) + 1]
        np.testing.assert_array_equal(annotation["bbox"], box)


def test_polygons_and_both_kinds_of_rle_are_mixed(coco):
    kinds = Counter()
    for annotation in coco.dataset["annotations"]:
        segmentation = annotation["segmentation"]
        if isinstance(segmentation, list):
            kinds["polygon"] += 1
            assert not annotation["iscrowd"]
        else:
            assert segmentation["size"] == list(SIZE)
            kinds[type(segmentation["counts"]).__name__] += 1
            assert isinstance(segmentation["counts"], list) == annotation["iscrowd"]
    total = kinds.total()
    assert kinds["polygon"] > 0.3 * total
    assert kinds["str"] > 0.2 * total
    assert kinds["list"] >= 5


def test_all_coco_sizes_are_present(coco):
    areas = np.array([a["area"] for a in coco.dataset["annotations"] if not a["iscrowd"]])
    small, large = np.mean(areas < 32**2), np.mean(areas >= 96**2)
    assert 0.2 < small < 0.6
    assert 0.005 < large < 0.3
    assert 1 - small - large > 0.3


def test_some_images_are_empty_and_most_hold_a_few_objects(coco):
    counts = np.array([len(coco.getAnnIds(imgIds=[i], iscrowd=False)) for i in coco.getImgIds()])
    empty = [i for i in coco.getImgIds() if not coco.getAnnIds(imgIds=[i])]
    assert 1 <= len(empty) <= 0.08 * len(counts)
    assert counts.max() <= 8
    assert 2.5 < counts.mean() < 5


def test_rings_keep_their_hole(coco):
    rings = coco.loadAnns(coco.getAnnIds(catIds=[SHAPES.category_ids["ring"]], iscrowd=False))
    with_hole = 0
    for annotation in rings:
        mask = coco.annToMask(annotation)
        _, hierarchy = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
        hole = (hierarchy[0][:, 3] >= 0).any()
        with_hole += hole
        assert not (hole and isinstance(annotation["segmentation"], list))
    assert with_hole > 0.5 * len(rings)


# --- masks against the drawing


def test_segmentations_agree_with_the_drawn_masks():
    polygons = 0
    for index in range(40):
        rng = np.random.default_rng(index)
        for shape in scene(index)[1]:
            annotation = shapes.mask_annotation(rng, shape, polygons=0.8)
            segmentation = annotation["segmentation"]
            if isinstance(segmentation, list):
                polygons += 1
                rle = mask_util.frPyObjects(segmentation, *SIZE)[0]
            elif shape.is_crowd:
                rle = mask_util.frPyObjects(segmentation, *SIZE)
            else:
                rle = segmentation
            decoded = mask_util.decode(rle).astype(bool)
            if isinstance(segmentation, list):
                iou = (decoded & shape.mask).sum() / (decoded | shape.mask).sum()
                assert iou >= 0.95
            else:
                np.testing.assert_array_equal(decoded, shape.mask)
    assert polygons > 30


@pytest.mark.parametrize("holed", [True, False], ids=["a hole", "two parts"])
def test_masks_that_one_polygon_cannot_show_get_none(holed):
    mask = np.zeros((32, 32), bool)
    mask[4:28, 4:28] = True
    assert shapes._polygon(mask) == [4, 4, 4, 28, 28, 28, 28, 4]
    if holed:
        mask[12:20, 12:20] = False
    else:
        mask[12:20] = False
    assert shapes._polygon(mask) is None


def test_visible_parts_do_not_overlap_and_every_shape_stays_visible():
    overlapped = 0
    for index in range(40):
        shapes = scene(index)[1]
        total = np.sum([s.mask for s in shapes], axis=0) if shapes else np.zeros(SIZE)
        assert total.max() <= 1
        overlapped += any(
            s.mask.sum() < 0.8 * cv2.contourArea(cv2.convexHull(np.argwhere(s.mask)))
            for s in shapes
            if scenes.CLASSES[s.category] in ("disc", "square", "triangle")
        )
        for shape in shapes:
            assert shape.mask.sum() >= scenes.MIN_PIXELS
    assert overlapped >= 3


def test_later_shapes_cover_earlier_ones(monkeypatch):
    """With flat colors and no noise, every visible mask has a uniform color."""

    def flat(rng, size, color, spread):
        return np.tile(color, (*size, 1))

    monkeypatch.setattr(scenes, "_texture", flat)
    checked = 0
    for index in range(15):
        image, shapes = scene(index)
        for shape in shapes:
            inner = cv2.erode(shape.mask.astype(np.uint8), np.ones((5, 5)), borderValue=1) > 0
            if shape.is_crowd or inner.sum() < 20:
                continue
            spread = image[inner].std(0)
            # only the noise of the image, with a deviation of at most 8
            assert (spread < 9.5).all()
            checked += 1
    assert checked > 20


def test_crowd_regions_hold_many_tiny_shapes():
    rng = np.random.default_rng(0)
    for _ in range(5):
        layers = scenes._crowd_layers(rng, 0, SIZE)
        assert len(layers) >= 4
        assert all(layer.area < 12**2 for layer in layers)
        region = scenes._crowd_region(layers, SIZE)
        for layer in layers:
            assert (region | ~layer.mask).all()
    assert max(len(scenes._crowd_layers(rng, 0, SIZE)) for _ in range(5)) >= 12


def test_classes_differ_in_shape_and_not_in_color():
    """Mean colors per class are alike; the filled fraction of the box is not."""
    colors, fills = {}, {}
    for index in range(150):
        image, shapes = scene(index)
        for shape in shapes:
            if shape.is_crowd:
                continue
            y, x = np.nonzero(shape.mask)
            colors.setdefault(shape.category, []).append(image[shape.mask].mean(0))
            fills.setdefault(shape.category, []).append(len(x) / (np.ptp(x) + 1) / (np.ptp(y) + 1))
    means = np.array([np.mean(c, 0) for c in colors.values()])
    assert np.ptp(means, axis=0).max() < 40
    fill = {scenes.CLASSES[k]: np.median(v) for k, v in fills.items()}
    assert max(fill["ring"], fill["triangle"], fill["cross"]) < 0.9 * fill["disc"]


@pytest.mark.parametrize("name", scenes.CLASSES)
def test_a_rasterized_shape_has_the_area_it_should(name):
    category = scenes.CLASSES.index(name)
    for extent, tolerance in ((14, 0.12), (40, 0.05)):  # cv2.fillPoly adds a little all around
        layer = scenes._layer(
            np.random.default_rng(1), category, extent, np.array([64.0, 64.0]), (128, 128)
        )
        assert layer.alpha.sum() == pytest.approx(extent**2, rel=tolerance)
        assert layer.mask.sum() == pytest.approx(extent**2, rel=tolerance)


@pytest.mark.parametrize("size", [(32, 32), (64, 200), (300, 150)])
def test_other_sizes_work(size):
    for index in range(4):
        image, shapes = scene(index, size=size)
        assert image.shape == (*size, 3)
        assert image.dtype == np.uint8
        assert all(shape.mask.shape == size for shape in shapes)


# --- cache


def ensure(shapes=SHAPES, **other):
    return shapes.ensure(**({"count": 2, "size": (48, 64), "seed": 0, "split": "train"} | other))


def test_a_set_is_drawn_once(cache_dir, monkeypatch):
    folder = ensure()
    assert folder.parent == cache_dir
    monkeypatch.setattr(shapes.DrawnSet, "generate", lambda *a, **k: pytest.fail("drawn twice"))
    assert ensure() == folder


def test_every_parameter_and_the_format_have_a_folder_of_their_own(cache_dir):
    folders = {ensure(), ensure(count=1), ensure(size=(64, 48)), ensure(seed=1)}
    folders.add(ensure(split="val"))
    folders.add(ensure(dataclasses.replace(SHAPES, version=SHAPES.version + 1)))
    assert len(folders) == 6


def test_a_failing_generation_leaves_nothing(cache_dir, monkeypatch):
    def fail(_, folder, **__):
        (folder / "half").write_text("")
        raise RuntimeError("disk full")

    monkeypatch.setattr(shapes.DrawnSet, "generate", fail)
    with pytest.raises(RuntimeError, match="disk full"):
        ensure()
    assert [p.name for p in cache_dir.iterdir() if p.is_dir()] == []


# Draws a set with a pause after each image; does not import the models.
DRAW_SLOWLY = """
import dataclasses, sys, time
from solo_d2.data import SHAPES

def slowly(*args):
    print("drawing", flush=True)
    time.sleep(0.1)
    return SHAPES.draw_scene(*args)
print("start", flush=True)
sys.stdin.readline()
slow = dataclasses.replace(SHAPES, draw_scene=slowly)
slow.ensure(count=6, size=(48, 64), seed=0, split="train")
"""


def start_drawing(cache_dir):
    environment = os.environ | {"SOLO_D2_CACHE": str(cache_dir), "PYTHONWARNINGS": "ignore"}
    return subprocess.Popen(
        [sys.executable, "-c", DRAW_SLOWLY],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_two_processes_at_once_and_one_killed_half_way_leave_whole_sets(cache_dir, tmp_path):
    SHAPES.generate(tmp_path / "expected", count=6, size=(48, 64), seed=0, split="train")
    processes = [start_drawing(cache_dir) for _ in range(3)]
    for process in processes:
        assert process.stdout.readline() == "start\n"
    killed, *others = processes

    def go(process):
        process.stdin.write("\n")
        process.stdin.flush()

    go(killed)
    assert killed.stdout.readline() == killed.stdout.readline() == "drawing\n"
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    # no set yet, but an unfinished one
    assert [p.name.split("-")[0] for p in cache_dir.iterdir() if p.is_dir()] == ["unfinished"]

    for process in others:
        go(process)
    drawn = sum(p.communicate(timeout=60)[0].count("drawing") for p in others)
    assert [p.returncode for p in others] == [0, 0]
    assert drawn == 6  # the second waited for the first
    (folder,) = [p for p in cache_dir.iterdir() if p.is_dir()]
    assert files(folder) == files(tmp_path / "expected")


def test_a_folder_is_invisible_until_it_is_full(cache_dir):
    def fill(folder):
        (folder / "a").write_text("")
        assert not (cache_dir / "set").exists()

    assert (cache.ensure_folder("set", fill) / "a").exists()


# --- registration


def test_registered_sets_are_drawn_when_loaded(cache_dir):
    SHAPES.register(train_images=3, val_images=2, image_size=(64, 96), seed=5)
    assert not cache_dir.exists()
    for name, count in (("shapes_train", 3), ("shapes_val", 2)):
        records = DatasetCatalog.get(name)
        assert len(records) == count
        metadata = MetadataCatalog.get(name)
        assert metadata.evaluator_type == "coco"
        assert metadata.thing_classes == list(scenes.CLASSES)
        contiguous = metadata.thing_dataset_id_to_contiguous_id
        assert list(contiguous.values()) == list(range(len(scenes.CLASSES)))
        document = json.loads(open(metadata.json_file).read())
        assert {c["name"] for c in document["categories"]} == set(metadata.thing_classes)
        expected = [contiguous[a["category_id"]] for a in document["annotations"]]
        assert [a["category_id"] for r in records for a in r["annotations"]] == expected
        for record in records:
            assert (record["height"], record["width"]) == (64, 96)
            assert os.path.dirname(record["file_name"]) == metadata.image_root
            assert os.path.exists(record["file_name"])


def test_the_ground_truth_scores_full_marks(cache_dir):
    SHAPES.register(val_images=40, seed=1)
    records = DatasetCatalog.get("shapes_val")
    evaluator = COCOEvaluator("shapes_val", tasks=("bbox", "segm"), distributed=False)
    evaluator.reset()
    for record in records:
        annotations = [a for a in record["annotations"] if not a["iscrowd"]]
        if annotations:
            truth = annotations_to_instances(annotations, SIZE, mask_format="bitmask")
            predicted = Instances(SIZE)
            predicted.pred_masks = truth.gt_masks.tensor
            predicted.pred_boxes = truth.gt_masks.get_bounding_boxes()
            predicted.pred_classes = truth.gt_classes
            predicted.scores = torch.ones(len(annotations))
            evaluator.process([record], [{"instances": predicted}])
    results = evaluator.evaluate()
    for task in ("bbox", "segm"):
        for metric in ("AP", "APs", "APm", "APl"):
            assert results[task][metric] == pytest.approx(100)


def test_registering_again_replaces(cache_dir):
    SHAPES.register(val_images=1, image_size=(64, 64))
    assert len(DatasetCatalog.get("shapes_val")) == 1
    SHAPES.register(val_images=2, image_size=(64, 64))
    assert len(DatasetCatalog.get("shapes_val")) == 2
    assert "-2x64x64-" in MetadataCatalog.get("shapes_val").json_file
