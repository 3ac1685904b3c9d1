"""Masks are ranked by their own scores if the model predicts any."""

import json

import pytest
import torch
from detectron2.structures import Boxes, Instances

from solo_d2.evaluation.coco import RESULTS_FILE, InstanceEvaluator


def predictions(record, scores: list[float], mask_scores: list[float] | None) -> Instances:
    """The first object of an image, and a copy of it a third of the image away."""
    height, width = record["height"], record["width"]
    x, y, w, h = record["annotations"][0]["bbox"]
    instances = Instances((height, width))
    boxes = torch.tensor([[x, y, x + w, y + h]] * 2)
    boxes[1, 0::2] += width / 3
    instances.pred_boxes = Boxes(boxes)
    instances.scores = torch.tensor(scores)
    instances.pred_classes = torch.full((2,), record["annotations"][0]["category_id"])
    masks = torch.zeros(2, height, width, dtype=torch.bool)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.round().int().tolist()):
        mask[y1:y2, x1:x2] = True
    instances.pred_masks = masks
    if mask_scores is not None:
        instances.mask_scores = torch.tensor(mask_scores)
    return instances


@pytest.fixture
def evaluate(shapes_val, tmp_path):
    """Results and results file of predictions, for objects that fill their boxes."""
    records = shapes_val(3)

    def run(scores, mask_scores):
        evaluator = InstanceEvaluator("shapes_val", output_dir=str(tmp_path))
        api = evaluator._coco_api
        for annotation in api.anns.values():
            x, y, w, h = annotation["bbox"]
            annotation["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
        evaluator.reset()
        outputs = [{"instances": predictions(r, scores, mask_scores)} for r in records]
        evaluator.process(records, outputs)
        return evaluator.evaluate(), json.loads((tmp_path / RESULTS_FILE).read_text())

    return run


def test_boxes_and_masks_are_ranked_each_by_their_own_scores(evaluate):
    good_boxes_first, _ = evaluate([0.9, 0.5], [0.2, 0.8])
    good_masks_first, _ = evaluate([0.5, 0.9], [0.8, 0.2])
    both, _ = evaluate([0.9, 0.5], [0.8, 0.2])
    box, mask = both["bbox"]["AP50"], both["segm"]["AP50"]
    assert good_boxes_first["bbox"]["AP50"] == box
    assert good_boxes_first["segm"]["AP50"] < mask
    assert good_masks_first["bbox"]["AP50"] < box
    assert good_masks_first["segm"]["AP50"] == mask


def test_without_mask_scores_masks_have_those_of_the_boxes(evaluate):
    with_scores, _ = evaluate([0.5, 0.9], [0.5, 0.9])
    without, file = evaluate([0.5, 0.9], None)
    assert without["segm"] == pytest.approx(with_scores["segm"], nan_ok=True)
    assert not any("mask_score" in result for result in file)


def test_the_results_file_has_both(evaluate):
    _, file = evaluate([0.9, 0.5], [-0.25, 0.75])
    assert {(round(r["score"], 3), r["mask_score"]) for r in file} == {(0.9, -0.25), (0.5, 0.75)}
