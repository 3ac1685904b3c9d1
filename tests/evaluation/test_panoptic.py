"""Panoptic quality against cases worked out by hand, and against the original's counts."""

import json
import math
import sys

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from PIL import Image

from solo_d2.errors import UserError
from solo_d2.evaluation.panoptic import (
    PanopticEvaluator,
    paint_ground_truth,
    panoptic_quality,
)

SIZE = (10, 20)


def mask(rows, columns, size=SIZE):
    result = torch.zeros(size, dtype=torch.bool)
    result[rows[0] : rows[1], columns[0] : columns[1]] = True
    return result


def annotation(where, category=0, iscrowd=0):
    rle = mask_util.encode(np.asfortranarray(where.numpy(), np.uint8))
    return {
        "segmentation": rle,
        "bbox": mask_util.toBbox(rle).tolist(),
        "bbox_mode": BoxMode.XYWH_ABS,
        "category_id": category,
        "iscrowd": iscrowd,
    }


def prediction(*segments):
    """Later masks cover earlier ones; each is (mask, is a thing, category)."""
    ids = torch.zeros(SIZE, dtype=torch.int32)
    info = []
    for number, (where, isthing, category) in enumerate(segments, start=1):
        ids[where] = number
        info.append({"id": number, "isthing": isthing, "category_id": category})
    return ids, info


BACKGROUND = (mask((0, 10), (0, 20)), False, 0)


@pytest.fixture
def data_set():
    """(records, stuff_classes) -> the name of a data set of two classes of things."""
    names = []

    def make(records, **metadata):
        name = f"panoptic_test_{len(names)}"
        names.append(name)
        DatasetCatalog.register(name, lambda: records)
        MetadataCatalog.get(name).set(thing_classes=["a", "b"], **metadata)
        return name

    yield make
    for name in names:
        DatasetCatalog.pop(name)
        MetadataCatalog.pop(name)


@pytest.fixture
def evaluate(data_set):
    """Pairs of annotations and a prediction -> results."""

    def run(*pairs):
        records = [
            {"file_name": str(i), "height": SIZE[0], "width": SIZE[1], "annotations": annotations}
            for i, (annotations, _) in enumerate(pairs)
        ]
        evaluator = PanopticEvaluator(data_set(records))
        evaluator.reset()
        for record, (_, panoptic) in zip(records, pairs, strict=True):
            inputs = {k: v for k, v in record.items() if k != "annotations"}
            evaluator.process([inputs], [{"panoptic_seg": panoptic}])
        return evaluator.evaluate()["panoptic_seg"]

    return run


def test_perfect_predictions_get_full_marks(evaluate):
    box, other = mask((0, 5), (0, 5)), mask((5, 10), (10, 20))
    truth = [annotation(box), annotation(other, category=1)]
    results = evaluate((truth, prediction(BACKGROUND, (other, True, 1), (box, True, 0))))
    assert set(results) == {f"{q}{p}" for q in ("PQ", "SQ", "RQ") for p in ("", "_th", "_st")}
    assert all(value == pytest.approx(100) for value in results.values())


def test_a_case_worked_out_by_hand(evaluate):
    """Two images; every kind of count.

    Image 1, things of class a: one found with IoU 40 / 50, one missed. Class b: one predicted
    that does not exist. Stuff: background 200 - 50 - 20 = 130 true, predicted 200 - 40 - 20 = 140;
    both: 130 - 20 (the false b) = 110, so IoU 110 / (130 + 140 - 110) = 0.6875.
    Image 2 is all background and predicted as such: IoU 1.
    """
    found, missed, false = mask((0, 5), (0, 10)), mask((5, 7), (0, 10)), mask((8, 10), (10, 20))
    one = (
        [annotation(found), annotation(missed)],
        prediction(BACKGROUND, (mask((0, 4), (0, 10)), True, 0), (false, True, 1)),
    )
    results = evaluate(one, ([], prediction(BACKGROUND)))
    class_a = {"SQ": 80, "RQ": 100 / 1.5, "PQ": 80 / 1.5}  # one of two, nothing false
    class_b = {"SQ": 0, "RQ": 0, "PQ": 0}
    background = {"SQ": 100 * (0.6875 + 1) / 2, "RQ": 100, "PQ": 100 * (0.6875 + 1) / 2}
    for name in ("PQ", "SQ", "RQ"):
        things = (class_a[name] + class_b[name]) / 2
        everything = (class_a[name] + class_b[name] + background[name]) / 3
        assert results[f"{name}_th"] == pytest.approx(things)
        assert results[f"{name}_st"] == pytest.approx(background[name])
        assert results[name] == pytest.approx(everything)


def test_a_class_that_does_not_occur_is_in_no_average(evaluate):
    box = mask((0, 5), (0, 5))
    results = evaluate(([annotation(box)], prediction(BACKGROUND, (box, True, 0))))
    assert results["PQ_th"] == pytest.approx(100)


def test_an_iou_of_one_half_is_no_match(evaluate):
    truth = [annotation(mask((0, 4), (0, 10)))]
    half = prediction(BACKGROUND, (mask((0, 2), (0, 10)), True, 0))
    assert evaluate((truth, half))["PQ_th"] == 0


def test_an_object_where_the_prediction_is_open_is_missed(evaluate):
    """torchmetrics by itself would forgive it."""
    box = mask((0, 4), (0, 10))
    ids, info = prediction(BACKGROUND)
    ids[box] = 0
    results = evaluate(([annotation(box)], (ids, info)))
    assert results["RQ_th"] == 0
    assert results["PQ_st"] == pytest.approx(100)


def test_open_pixels_of_a_prediction_stay_in_the_union(evaluate):
    box, part = mask((0, 4), (0, 10)), mask((0, 3), (0, 10))
    ids, info = prediction(BACKGROUND, (part, True, 0))
    ids[box & ~part] = 0
    assert evaluate(([annotation(box)], (ids, info)))["SQ_th"] == pytest.approx(75)


@pytest.mark.parametrize(("inside", "counted"), [(0.4, True), (0.5, True), (0.6, False)])
def test_predictions_mostly_in_a_crowd_are_not_counted(evaluate, inside, counted):
    crowd = annotation(mask((0, 10), (0, 10)), iscrowd=1)
    left = 10 - round(10 * inside)
    false = (mask((0, 4), (left, left + 10)), True, 0)
    results = evaluate(([crowd], prediction(BACKGROUND, false)))
    if counted:
        assert results["PQ_th"] == 0
    else:
        assert math.isnan(results["PQ_th"])


def test_void_is_not_in_the_union(evaluate):
    crowd, box = annotation(mask((0, 10), (0, 5)), iscrowd=1), mask((0, 4), (5, 15))
    wide = (mask((0, 4), (0, 15)), True, 0)
    results = evaluate(([crowd, annotation(box)], prediction(BACKGROUND, wide)))
    assert results["SQ_th"] == pytest.approx(100)


def test_a_match_needs_the_class(evaluate):
    box = mask((0, 4), (0, 10))
    results = evaluate(([annotation(box)], prediction(BACKGROUND, (box, True, 1))))
    assert results["PQ_th"] == 0


def test_nothing_predicted(evaluate):
    nothing = torch.zeros(SIZE, dtype=torch.int32), []
    results = evaluate(([annotation(mask((0, 4), (0, 10)))], nothing))
    assert results["PQ"] == 0


def test_smaller_masks_are_painted_over_larger_ones_and_crowds_below_all():
    small, large = mask((0, 4), (0, 4)), mask((0, 8), (0, 8))
    crowd = mask((0, 10), (0, 12))
    for order in (1, -1):
        annotations = [annotation(large), annotation(small, 1), annotation(crowd, iscrowd=1)]
        ids, segments = paint_ground_truth(annotations[::order], SIZE)
        categories = {s["id"]: (s["isthing"], s["category_id"]) for s in segments}
        assert (ids[crowd & ~large] == 0).all()
        assert {categories[i] for i in ids[small].tolist()} == {(True, 1)}
        assert {categories[i] for i in ids[large & ~small].tolist()} == {(True, 0)}
        assert {categories[i] for i in ids[~crowd].tolist()} == {(False, 0)}


def save_panoptic(path, ids):
    rgb = np.stack([ids % 256, ids // 256 % 256, ids // 256**2], axis=-1)
    Image.fromarray(rgb.astype(np.uint8)).save(path)
    return str(path)


def test_a_panoptic_picture_is_the_truth_where_there_is_one(data_set, tmp_path):
    ids = np.full(SIZE, 70000)
    ids[:5, :5], ids[5:, :5] = 300, 5
    segments = [
        {"id": 70000, "isthing": False, "category_id": 1, "iscrowd": 0},
        {"id": 300, "isthing": True, "category_id": 1, "iscrowd": 0},
        {"id": 5, "isthing": True, "category_id": 0, "iscrowd": 1},
    ]
    record = {
        "file_name": "x",
        "pan_seg_file_name": save_panoptic(tmp_path / "x.png", ids),
        "segments_info": segments,
    }
    evaluator = PanopticEvaluator(data_set([record], stuff_classes=["sky", "sea"]))
    panoptic = prediction((mask((0, 10), (0, 20)), False, 1), (mask((0, 5), (0, 5)), True, 1))
    evaluator.process([record], [{"panoptic_seg": panoptic}])
    results = evaluator.evaluate()["panoptic_seg"]
    # the crowd is not in the union
    assert results["PQ"] == results["PQ_st"] == results["PQ_th"] == pytest.approx(100)


def test_more_stuff_than_the_data_have_is_named(data_set):
    record = {"file_name": "a", "height": 10, "width": 20, "annotations": []}
    evaluator = PanopticEvaluator(data_set([record]))
    output = {"panoptic_seg": prediction((mask((0, 10), (0, 20)), False, 2))}
    with pytest.raises(UserError, match="predicts stuff class 2, but data set .* has 1 .*NUM_STUF"):
        evaluator.process([record], [output])


def test_of_one_class_of_stuff_the_number_does_not_matter(evaluate):
    """Detectron2's panoptic models count stuff from 1: 0 stands for all things."""
    ids, segments = prediction(BACKGROUND)
    segments[0]["category_id"] = 1
    assert evaluate(([], (ids, segments)))["PQ_st"] == pytest.approx(100)


def test_the_truth_of_a_separated_set_is_its_panoptic_json(data_set, tmp_path):
    """Its records have instances and semantic labels, but not the panoptic picture."""
    ids = np.full(SIZE, 70000)
    ids[:5, :5] = 300
    save_panoptic(tmp_path / "x.png", ids)
    (tmp_path / "x.jpg").touch()
    segments = [
        {"id": 70000, "category_id": 92, "iscrowd": 0},
        {"id": 300, "category_id": 7, "iscrowd": 0},
    ]
    document = {"annotations": [{"image_id": 1, "file_name": "x.png", "segments_info": segments}]}
    (tmp_path / "panoptic.json").write_text(json.dumps(document))
    record = {"file_name": str(tmp_path / "x.jpg"), "annotations": []}
    name = data_set(
        [record],
        stuff_classes=["things", "sky", "sea"],
        panoptic_json=str(tmp_path / "panoptic.json"),
        panoptic_root=str(tmp_path),
        image_root=str(tmp_path),
        thing_dataset_id_to_contiguous_id={3: 0, 7: 1},
        stuff_dataset_id_to_contiguous_id={0: 0, 92: 1, 94: 2},
    )
    evaluator = PanopticEvaluator(name)
    panoptic = prediction((mask((0, 10), (0, 20)), False, 1), (mask((0, 5), (0, 5)), True, 1))
    evaluator.process([record], [{"panoptic_seg": panoptic}])
    results = evaluator.evaluate()["panoptic_seg"]
    assert results["PQ_st"] == results["PQ_th"] == pytest.approx(100)


def test_a_set_may_know_its_classes_only_when_it_is_loaded():
    """As after ``register_coco_instances``; nothing is written into its metadata."""
    name, box = "panoptic_test_lazy", mask((0, 4), (0, 4))
    record = {"file_name": "x", "height": SIZE[0], "width": SIZE[1]}
    record["annotations"] = [annotation(box, category=1)]

    def load():
        MetadataCatalog.get(name).thing_classes = ["a", "b"]
        return [record]

    DatasetCatalog.register(name, load)
    try:
        evaluator = PanopticEvaluator(name)
        evaluator.process([record], [{"panoptic_seg": prediction(BACKGROUND, (box, True, 1))}])
        assert evaluator.evaluate()["panoptic_seg"]["PQ"] == pytest.approx(100)
        assert MetadataCatalog.get(name).get("stuff_classes") is None
    finally:
        DatasetCatalog.pop(name)
        MetadataCatalog.pop(name)


def test_reset_forgets(evaluate, data_set):
    record = {"file_name": "x", "height": SIZE[0], "width": SIZE[1], "annotations": []}
    evaluator = PanopticEvaluator(data_set([record]))
    evaluator.process([record], [{"panoptic_seg": prediction((BACKGROUND[0], True, 0))}])
    evaluator.reset()
    evaluator.process([record], [{"panoptic_seg": prediction(BACKGROUND)}])
    assert evaluator.evaluate()["panoptic_seg"]["PQ"] == pytest.approx(100)


def test_without_torchmetrics_one_line_says_what_to_install(data_set, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics.detection", None)
    with pytest.raises(UserError, match="pip install torchmetrics"):
        PanopticEvaluator(data_set([]))


def test_averages_of_counts():
    counts = torch.tensor([[1.5, 0.0, 0.9], [2, 0, 1], [1, 0, 0], [0, 0, 1]])
    results = panoptic_quality(counts, num_things=2)
    assert results["PQ_th"] == pytest.approx(100 * 1.5 / 2.5)
    assert results["PQ_st"] == pytest.approx(100 * 0.9 / 1.5)
    assert results["RQ"] == pytest.approx(100 * (2 / 2.5 + 1 / 1.5) / 2)
    assert results["SQ"] == pytest.approx(100 * (0.75 + 0.9) / 2)


@pytest.mark.golden
def test_counts_are_those_of_the_original(load_golden, data_set, tmp_path):
    golden = load_golden("adaptis_parts")
    for k, case in enumerate(golden.meta["greedy_cases"]):
        stuff, things = case["n_stuff"], case["n_things"]

        def segment(number, category, stuff=stuff):
            isthing = category >= stuff
            return {
                "id": number,
                "isthing": isthing,
                "category_id": category - stuff if isthing else category,
            }

        truth = golden[f"greedy{k}_gt_ids"].numpy().astype(np.int64) + 1
        classes = golden[f"greedy{k}_gt_class"].tolist()
        record = {
            "file_name": str(k),
            "pan_seg_file_name": save_panoptic(tmp_path / f"{k}.png", truth),
            "segments_info": [segment(i, c) for i, c in enumerate(classes, start=1)],
        }
        ids = golden[f"greedy{k}_instances_mask"].long()
        semantic = golden[f"greedy{k}_semantic"]
        instances = golden[f"greedy{k}_instance_class"].tolist()
        segments = [segment(i, c) for i, c in enumerate(instances, start=1)]
        for c in range(stuff):
            number = len(instances) + 1 + c
            ids[(golden[f"greedy{k}_instances_mask"] == 0) & (semantic == c)] = number
            segments.append(segment(number, c))

        names = [str(c) for c in range(max(stuff, things))]
        name = data_set([record], stuff_classes=names[:stuff])
        MetadataCatalog.pop(name)
        MetadataCatalog.get(name).set(thing_classes=names[:things], stuff_classes=names[:stuff])
        evaluator = PanopticEvaluator(name)
        evaluator.process([record], [{"panoptic_seg": (ids, segments)}])
        expected = golden[f"greedy{k}_pq"]
        expected = torch.cat([expected[stuff:], expected[:stuff]]).T
        counts = evaluator.counts()
        np.testing.assert_allclose(counts, expected, rtol=1e-4, atol=1e-5)
        results = evaluator.evaluate()["panoptic_seg"]
        assert results == pytest.approx(panoptic_quality(expected, things), rel=1e-4)
