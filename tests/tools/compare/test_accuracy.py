"""COCO's numbers of a run, its curves, and the images on which models differ."""

import json
import os

import numpy as np
import pycocotools.mask as mask_util
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from solo_d2.tools.compare import accuracy


def write_lines(folder, *lines, rest=""):
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.json").write_text(text + rest)


def test_losses_and_validations_are_read_apart(tmp_path):
    write_lines(
        tmp_path,
        {"iteration": 19, "total_loss": 3.0, "loss_a": 1.0, "loss_b": 2.0, "time": 0.5, "lr": 1},
        {"iteration": 24, "segm/AP": 10.0, "bbox/AP": 12.0, "segm/AP50": 20.0},
        {"iteration": 39, "total_loss": float("nan"), "loss_a": 0.5, "time": 1.5},
        {"iteration": 40, "segm/AP": float("nan"), "bbox/AP": 1.0},
        rest='{"iteration": 59, "tot',
    )
    curve = accuracy.training_curve(tmp_path)
    assert curve == {
        "iteration": [19, 39],
        "losses": {"loss_a": [1.0, 0.5], "loss_b": [2.0, None], "total_loss": [3.0, None]},
        "validation": {"iteration": [24, 40], "segm/AP": [10.0, None], "bbox/AP": [12.0, 1.0]},
    }
    json.dumps(curve, allow_nan=False)
    assert [x.get("time") for x in accuracy.read_metrics(tmp_path)] == [0.5, None, 1.5, None]


def test_no_training_has_no_curve(tmp_path):
    assert accuracy.training_curve(tmp_path) is None
    assert accuracy.read_metrics(tmp_path) == []


def rle(box, size=(20, 30)):
    mask = np.zeros(size, np.uint8, order="F")
    x, y, w, h = box
    mask[y : y + h, x : x + w] = 1
    encoded = mask_util.encode(mask)
    return {"size": list(size), "counts": encoded["counts"].decode()}


# (image, category, box, crowd)
OBJECTS = [
    (1, 5, (0, 0, 10, 10), 0),
    (1, 5, (15, 0, 10, 10), 0),
    (1, 9, (0, 12, 6, 6), 0),
    (2, 9, (2, 2, 8, 8), 0),
    (2, 5, (12, 2, 8, 8), 1),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three images, the last without objects; three classes, the last without objects."""
    folder = tmp_path_factory.mktemp("data")
    images = [{"id": i, "file_name": f"{i}.png", "height": 20, "width": 30} for i in (1, 2, 3)]
    annotations = [
        {
            **{"id": i + 1, "image_id": image, "category_id": category, "iscrowd": crowd},
            **{"bbox": list(box), "area": box[2] * box[3], "segmentation": rle(box)},
        }
        for i, (image, category, box, crowd) in enumerate(OBJECTS)
    ]
    ids = {5: 0, 9: 1, 11: 2}
    document = {"images": images, "annotations": annotations}
    document["categories"] = [{"id": c, "name": n} for c, n in zip(ids, ("cat", "dog", "emu"))]
    (folder / "x.json").write_text(json.dumps(document))
    DatasetCatalog.register(
        "comparison_test",
        lambda: [{"image_id": x["id"], "file_name": str(folder / x["file_name"])} for x in images],
    )
    MetadataCatalog.get("comparison_test").set(
        json_file=str(folder / "x.json"),
        image_root=str(folder),
        thing_classes=["cat", "dog", "emu"],
        thing_dataset_id_to_contiguous_id=ids,
    )
    yield accuracy.TestSet("comparison_test")
    DatasetCatalog.pop("comparison_test")
    MetadataCatalog.pop("comparison_test")


def detection(image, category, box, score, **more):
    found = {"image_id": image, "category_id": category, "score": score, **more}
    return {**found, "bbox": list(box), "segmentation": rle(box)}


PERFECT_CLASS = {"AP": 100, "AP50": 100, "AR100": 100, "F1": 100, "threshold": 0.9}
PERFECT = [detection(i, c, box, 0.9) for i, c, box, crowd in OBJECTS if not crowd]


def test_perfect_detections_are_worth_100_per_cent(data):
    found = accuracy.evaluate_detections(data, PERFECT)
    for task in ("segm", "bbox"):
        metrics = found["metrics"][task]
        assert list(metrics) == accuracy.METRICS
        assert metrics["AP"] == metrics["APs"] == metrics["AR100"] == pytest.approx(100)
        assert metrics["AR1"] == pytest.approx(75)  # one of two cats in an image
        assert metrics["APl"] is None  # there are none
        assert found["per_class"][task]["cat"] == pytest.approx(PERFECT_CLASS)
        assert found["per_class"][task]["emu"] == dict.fromkeys(PERFECT_CLASS)
        curves = found["pr_curves"][task]
        assert {"all classes, IoU 0.75", "cat, IoU 0.5", "dog, IoU 0.5"} < curves.keys()
        assert len(curves) == 5 and all(curve == [1.0] * 101 for curve in curves.values())
    assert found["ious"] == {1: [1, 1, 1], 2: [1], 3: []}
    assert found["confusion"] == [[2, 0, 0, 0], [0, 2, 0, 0], [0] * 4, [0] * 4]


def test_no_detections_are_worth_nothing_where_there_are_objects(data):
    found = accuracy.evaluate_detections(data, [])
    metrics = found["metrics"]["segm"]
    assert metrics["AP"] == metrics["APs"] == metrics["AR100"] == 0
    assert metrics["APl"] is None
    assert [x["AP"] for x in found["per_class"]["segm"].values()] == [0, 0, None]
    assert found["confusion"] == [[0, 0, 0, 2], [0, 0, 0, 2], [0] * 4, [0] * 4]
    assert found["errors"]["missed"]["AP"] == pytest.approx(100)
    assert found["pr_curves"]["segm"]["all classes, IoU 0.5"] == [0.0] * 101
    assert found["ious"] == {1: [0, 0, 0], 2: [0], 3: []}


def test_a_curve_falls_where_the_errors_are(data):
    # the first cat is found, then an error, then a part of the second
    found = accuracy.evaluate_detections(
        data,
        [
            detection(1, 5, (0, 0, 10, 10), 0.9),
            detection(3, 5, (0, 0, 10, 10), 0.8),
            detection(1, 5, (15, 0, 10, 6), 0.7),  # IoU 0.6
        ],
    )
    curve = found["pr_curves"]["segm"]["cat, IoU 0.5"]
    assert curve[:51] == [1.0] * 51
    assert curve[51:] == [pytest.approx(2 / 3, abs=1e-4)] * 50
    # F1 is best at the end: precision 2/3, recall 1
    cat = found["per_class"]["segm"]["cat"]
    assert (cat["F1"], cat["threshold"]) == (pytest.approx(80), 0.7)
    # half of the cats above IoU 0.6, which three of COCO's ten thresholds reach
    means = found["pr_curves"]["segm"]["all classes, mean over IoU 0.5 to 0.95"]
    assert means[60] == pytest.approx(3 / 10 * 2 / 3 / 2, abs=1e-4)
    assert found["ious"][1] == [1, pytest.approx(0.6), 0]


def test_masks_are_ranked_by_their_own_score(data):
    wrong, right = (0, 13, 5, 5), (0, 0, 10, 10)
    found = accuracy.evaluate_detections(
        data,
        [
            detection(2, 9, wrong, 0.9, mask_score=0.2),
            detection(1, 9, (0, 12, 6, 6), 0.8, mask_score=0.3),
            detection(1, 5, right, 0.1, mask_score=0.8),
        ],
    )
    assert found["per_class"]["segm"]["dog"]["AP"] > found["per_class"]["bbox"]["dog"]["AP"] > 0
    assert found["ious"][1][0] == 1  # confident by its mask's score


def test_confusion_counts_classes_strays_and_misses_and_leaves_crowds_out(data):
    found = accuracy.evaluate_detections(
        data,
        [
            detection(1, 9, (0, 0, 10, 10), 0.9),  # a cat called a dog
            detection(1, 5, (20, 12, 5, 5), 0.8),  # nothing there
            detection(1, 5, (15, 0, 10, 10), 0.2),  # not confident
            detection(2, 5, (12, 2, 8, 8), 0.9),  # the crowd, twice
            detection(2, 5, (12, 2, 8, 8), 0.7),
        ],
    )
    assert found["confusion"] == [[0, 1, 0, 1], [0, 0, 0, 2], [0] * 4, [1, 0, 0, 0]]


def test_disagreement_is_the_span_of_the_models():
    assert accuracy.disagreement({"a": [1.0, 0.5], "b": [0.6, 0.5]}) == pytest.approx(0.2)
    assert accuracy.disagreement({"a": [0.5], "b": [0.1], "c": [0.3]}) == pytest.approx(0.4)
    assert accuracy.disagreement({"a": [0.5]}) is None
    assert accuracy.disagreement({"a": [], "b": []}) is None


def test_the_gallery_begins_with_the_largest_disagreement(data, tmp_path):
    half = [x for x in PERFECT if x["image_id"] == 1]
    low = [detection(3, 5, (0, 0, 3, 3), 0.04), detection(3, 5, (0, 0, 3, 3), 0.2)]
    models = {"all": PERFECT, "half": [*half, *low]}
    files, ious = {}, {}
    for name, detections in models.items():
        files[name] = tmp_path / f"{name}.json"
        files[name].write_text(json.dumps(detections))
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text("{}")
        found = accuracy.load_accuracy(data, files[name], tmp_path / name / "results.json")
        ious[name] = found["ious"]
        assert ious[name].keys() == {1, 2, 3}
    gallery = accuracy.choose_gallery(data, ious, files, count=3)
    assert [x["image_id"] for x in gallery] == [2, 1, 3]
    first = gallery[0]
    assert first["disagreement"] == 1 and first["ious"] == {"all": 1.0, "half": 0.0}
    assert first["file_name"].endswith("/2.png")
    assert [(x["class"], x["iscrowd"]) for x in first["ground_truth"]] == [
        ("dog", False),
        ("cat", True),
    ]
    assert first["ground_truth"][0]["rle"] == rle((2, 2, 8, 8))
    assert first["predictions"] == {
        "all": [{"class": "dog", "score": 0.9, "rle": rle((2, 2, 8, 8))}],
        "half": [],
    }
    assert gallery[1]["disagreement"] == 0
    assert gallery[2]["disagreement"] is None and gallery[2]["ious"]["all"] is None
    assert gallery[2]["predictions"]["half"] == []  # not confident
    json.dumps(gallery, allow_nan=False)
    assert [x["image_id"] for x in accuracy.choose_gallery(data, ious, files, count=1)] == [2]
    assert accuracy.choose_gallery(data, {}, {}, count=3) == []
    one = accuracy.choose_gallery(data, {"half": ious["half"]}, {"half": files["half"]}, count=1)
    assert one[0]["image_id"] == 2  # nobody to disagree with: the worst


def test_accuracy_is_computed_again_after_a_new_evaluation(data, tmp_path):
    file, done = tmp_path / "detections.json", tmp_path / "results.json"
    file.write_text("[]")
    done.write_text("{}")
    assert accuracy.load_accuracy(data, file, done)["metrics"]["segm"]["AP"] == 0
    file.write_text(json.dumps(PERFECT))
    assert accuracy.load_accuracy(data, file, done)["metrics"]["segm"]["AP"] == 0
    kept = tmp_path / "accuracy.json"
    stamp = kept.stat().st_mtime_ns + 10**9
    os.utime(done, ns=(stamp, stamp))
    assert accuracy.load_accuracy(data, file, done)["metrics"]["segm"]["AP"] == pytest.approx(100)


def test_other_results_are_taken_from_the_evaluation(data, tmp_path):
    done = tmp_path / "results.json"
    done.write_text(json.dumps({"sem_seg": {"mIoU": 61.5, "IoU-cat": 70.0, "mACC": None}}))
    found = accuracy.load_accuracy(data, tmp_path / "no_detections.json", done)
    assert found["metrics"] == {"sem_seg": {"mIoU": 61.5, "mACC": None}}
    assert accuracy.main_score(found) == 61.5


def test_runs_are_summarized_with_their_sample_deviation():
    found = accuracy.summarize([{"AP": 1.0, "APl": None}, {"AP": 3.0, "APl": 2.0}])
    assert found["AP"] == {"mean": 2.0, "std": pytest.approx(2**0.5), "values": [1.0, 3.0]}
    assert found["APl"] == {"mean": None, "std": None, "values": [None, 2.0]}
    assert accuracy.summarize([{"AP": 1.0}])["AP"] == {"mean": 1.0, "std": None, "values": [1.0]}
    assert accuracy.summarize([]) == {}
