"""The error analysis on images whose answers a reader can check by eye."""

import json

import numpy as np
import pycocotools.mask as mask_util
import pytest
from pycocotools.coco import COCO

from solo_d2.evaluation.oracle import KINDS, corrected, error_costs, judge, match

CAT, DOG = 1, 2
# Three squares of 10 x 10 in images of 20 x 60: two cats and a dog.
LEFT, MIDDLE, RIGHT = (0, 0, 10, 10), (20, 0, 10, 10), (40, 0, 10, 10)
OBJECTS = [(CAT, LEFT), (CAT, MIDDLE), (DOG, RIGHT)]


def rle(box):
    x, y, w, h = box
    mask = np.zeros((20, 60), np.uint8, order="F")
    mask[y : y + h, x : x + w] = 1
    encoded = mask_util.encode(mask)
    return {"size": [20, 60], "counts": encoded["counts"].decode()}


def data_set(objects=OBJECTS, crowds=()):
    coco = COCO()
    annotations = [(c, box, 0) for c, box in objects] + [(c, box, 1) for c, box in crowds]
    coco.dataset = {
        "images": [{"id": 7, "file_name": "7.png", "height": 20, "width": 60}],
        "categories": [{"id": CAT, "name": "cat"}, {"id": DOG, "name": "dog"}],
        "annotations": [
            {
                **{"id": i, "image_id": 7, "category_id": category, "iscrowd": crowd},
                **{"bbox": list(box), "area": box[2] * box[3], "segmentation": rle(box)},
            }
            for i, (category, box, crowd) in enumerate(annotations, start=1)
        ],
    }
    coco.createIndex()
    return coco


def detection(category, box, score):
    return {"image_id": 7, "category_id": category, "segmentation": rle(box), "score": score}


PERFECT = [detection(c, box, 0.9) for c, box in OBJECTS]
HALF = (20, 0, 10, 4)  # IoU 0.4 with the cat in the middle

# name -> (detections instead of the perfect ones, their kinds, missed objects, costs in AP)
CASES = {
    "nothing is wrong": (PERFECT, ["correct"] * 3, 0, {}),
    # cat: AP 51 % (recall 0 to 0.5), dog: 100 %
    "a mask is too small": (
        [PERFECT[0], detection(CAT, HALF, 0.8), PERFECT[2]],
        ["correct", "correct", "localization"],
        0,
        {"masks": 24.75, "localization": 24.75, "missed": 0},
    ),
    # cats: perfect; dog: none, and the third cat is the worst, so that it costs nothing
    "a dog is called cat": (
        [*PERFECT[:2], detection(CAT, RIGHT, 0.8)],
        ["correct", "correct", "classification"],
        0,
        {"classification": 50},
    ),
    "an object is missed": (PERFECT[:2], ["correct", "correct"], 1, {"missed": 50}),
    # cats: the best of three is wrong, so precision is 1/2, then 2/3; the larger counts up to 1
    "something is seen where nothing is": (
        [*PERFECT, detection(CAT, (0, 12, 5, 5), 0.95)],
        ["background", "correct", "correct", "correct"],
        0,
        {"background": 50 / 3},
    ),
    # the second cat comes third: precision 1 up to recall 1/2, then 2/3
    "a cat is seen twice": (
        [
            *(detection(CAT, LEFT, 0.9), detection(CAT, LEFT, 0.8)),
            *(detection(CAT, MIDDLE, 0.7), PERFECT[2]),
        ],
        ["correct", "correct", "duplicate", "correct"],
        0,
        {"duplicate": 100 * 50 / 101 / 3 / 2},
    ),
    # best of all, and of the wrong class: precisions of the cats as above
    "class and mask are wrong": (
        [*PERFECT, detection(CAT, (40, 0, 10, 4), 0.95)],
        ["both", "correct", "correct", "correct"],
        0,
        {"both": 50 / 3},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_each_kind_of_error_costs_what_one_can_count(case):
    detections, kinds, missed_count, expected = CASES[case]
    ground_truth = data_set()
    before = json.dumps(detections)
    judged, missed = judge(ground_truth, detections)
    assert [x.kind for x in judged] == kinds and len(missed) == missed_count
    costs = error_costs(ground_truth, detections)
    assert json.dumps(detections) == before
    assert costs.keys() == {"as it is", *KINDS}
    for kind in expected:
        assert costs[kind]["AP"] == pytest.approx(expected[kind], abs=0.02), kind
    # all that is wrong here is of one kind
    total = max([0, *expected.values()])
    assert costs["as it is"]["AP"] + total == pytest.approx(100, abs=0.02)
    assert costs["as it is"]["APs"] == costs["as it is"]["AP"]
    assert costs["missed"]["APl"] is None


def test_of_two_detections_of_an_object_the_better_one_stays():
    # corrected, the small mask finds the cat that a worse detection finds as well
    judged, missed = judge(
        data_set(), [detection(CAT, MIDDLE, 0.5), detection(CAT, HALF, 0.8), *PERFECT[::2]]
    )
    fixed = corrected(judged, missed, "localization")
    assert sorted(x["score"] for x in fixed) == [0.8, 0.9, 0.9]
    assert {json.dumps(x["segmentation"], default=bytes.decode) for x in fixed} == {
        json.dumps(rle(box)) for _, box in OBJECTS
    }


def test_what_lies_in_a_crowd_is_no_error():
    ground_truth = data_set(crowds=[(CAT, (20, 10, 20, 10))])
    inside = detection(CAT, (22, 12, 4, 4), 0.95)
    judged, missed = judge(ground_truth, [*PERFECT, inside])
    assert [x.kind for x in judged] == ["ignored", "correct", "correct", "correct"]
    costs = error_costs(ground_truth, [*PERFECT, inside])
    assert costs["as it is"]["AP"] == pytest.approx(100)
    assert costs["background"]["AP"] == costs["masks"]["AP"] == pytest.approx(0)


def test_masks_are_replaced_by_the_nearest_whatever_its_class():
    judged, missed = judge(
        data_set(), [detection(DOG, HALF, 0.5), detection(DOG, (0, 15, 5, 5), 0.4)]
    )
    near, far = corrected(judged, missed, "masks")
    assert mask_util.iou([near["segmentation"]], [rle(MIDDLE)], [0]) == 1
    assert far["segmentation"] == rle((0, 15, 5, 5)) and near["category_id"] == DOG


def test_no_detections_miss_everything():
    costs = error_costs(data_set(), [])
    assert costs["as it is"]["AP"] == 0 and costs["missed"]["AP"] == pytest.approx(100)
    assert costs["background"]["AP"] == 0


def test_a_set_without_objects_has_no_ap():
    costs = error_costs(data_set(objects=()), PERFECT)
    assert all(value is None for cost in costs.values() for value in cost.values())


def test_only_the_detections_that_coco_counts_are_judged():
    many = [detection(CAT, (0, 12, 5, 5), 0.1 + i / 1000) for i in range(101)]
    judged, _ = judge(data_set(), [*many, *PERFECT])
    kinds = [x.kind for x in judged]
    assert kinds.count("background") == 98 and kinds.count("correct") == 3


def test_each_object_is_matched_once_by_the_best_but_a_crowd_again_and_again():
    overlaps = np.array([[0.9, 0.2], [0.8, 0.6], [0.7, 0.7], [0.3, 0.4]])
    assert match(overlaps, [False, True]) == [0, 1, 1, None]
    assert match(np.zeros((2, 0)), []) == [None, None]


def test_an_object_comes_before_a_crowd():
    assert match(np.array([[0.6, 0.9]]), [False, True]) == [0]
