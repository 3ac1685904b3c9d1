"""mIoU and the label maps that an evaluation writes."""

import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog

from solo_d2.config import load_config
from solo_d2.data.label_maps import read_label_map, record_label_map
from solo_d2.evaluation.build import build_evaluators
from solo_d2.evaluation.label_maps import LabelMapEvaluator


def evaluate(evaluator, records, predict):
    evaluator.reset()
    for record in records:
        labels = torch.as_tensor(predict(record_label_map(record)).astype("int64"))
        scores = torch.nn.functional.one_hot(labels, 6).permute(2, 0, 1).float()
        evaluator.process([{"file_name": record["file_name"]}], [{"sem_seg": scores}])
    return evaluator.evaluate()["sem_seg"]


def without_crowds(label_map):
    return np.where(label_map == 255, 0, label_map)


def test_the_truth_of_instances_is_painted(shapes_val, tmp_path):
    records = shapes_val(4)
    evaluator = LabelMapEvaluator("shapes_val", str(tmp_path))
    results = evaluate(evaluator, records, without_crowds)
    assert results["mIoU"] == pytest.approx(100)
    names = MetadataCatalog.get("shapes_val").thing_classes
    assert {f"IoU-{name}" for name in ["background", *names]} <= results.keys()
    # all background: its IoU is its share of the labeled pixels, and the others' is 0
    again = LabelMapEvaluator("shapes_val", str(tmp_path))
    results = evaluate(again, records, np.zeros_like)
    truth = np.concatenate([record_label_map(record).ravel() for record in records])
    share = (truth == 0).sum() / (truth != 255).sum()
    assert results["IoU-background"] == pytest.approx(100 * share)
    present = len(set(truth.tolist()) - {255})
    assert results["mIoU"] == pytest.approx(100 * share / present)


def test_label_maps_are_written_under_the_names_of_the_images(shapes_val, tmp_path):
    records = shapes_val(2)
    evaluate(LabelMapEvaluator("shapes_val", str(tmp_path)), records, without_crowds)
    for record in records:
        name = record["file_name"].rsplit("/", 1)[1].replace(".jpg", ".png")
        written = read_label_map(tmp_path / "label_maps" / name)
        assert np.array_equal(written, without_crowds(record_label_map(record)))


def test_the_model_chooses_the_evaluator(shapes_val, tmp_path):
    shapes_val(2)
    cfg = load_config(opts=("MODEL.META_ARCHITECTURE", "EPS"))
    (evaluator,) = build_evaluators(cfg, "shapes_val", str(tmp_path))
    assert type(evaluator) is LabelMapEvaluator
