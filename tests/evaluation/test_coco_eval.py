"""faster-coco-eval against pycocotools, and the evaluator on top of them."""

import copy
import json
from functools import lru_cache

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, Instances
from pycocotools.coco import COCO

from solo_d2.evaluation.coco import InstanceEvaluator
from solo_d2.evaluation.coco_eval import evaluate_coco

# Sides whose products are near the borders of COCO's area ranges, 32 ** 2 and 96 ** 2.
SIDES = [1, 4, 16, 31, 32, 33, 96, 97]


def rle(mask):
    encoded = mask_util.encode(np.asfortranarray(mask))
    return {"size": list(map(int, encoded["size"])), "counts": encoded["counts"].decode()}


def rectangle(rng, height, width):
    mask = np.zeros((height, width), np.uint8)
    y, x = rng.integers(height), rng.integers(width)
    mask[y : y + rng.choice(SIDES), x : x + rng.choice(SIDES)] = 1
    return mask


@lru_cache(None)
def random_data(seed):
    """(COCO document, results): crowds, polygons, ties, empty images and masks, near misses."""
    rng = np.random.default_rng(seed)
    classes = int(rng.integers(1, 4))
    most_objects, most_results = int(rng.choice([0, 3, 10, 30])), int(rng.choice([3, 20, 300]))
    levels = int(rng.choice([2, 10, 1000]))
    document = {"info": {}, "images": [], "annotations": [], "categories": []}
    document["categories"] = [{"id": c, "name": f"class {c}"} for c in range(1, classes + 2)]
    results = []
    for image_id in range(7, 7 + int(rng.integers(1, 12))):
        height, width = map(int, rng.choice([40, 100, 130], 2))
        image = {"id": image_id, "height": height, "width": width, "file_name": "none"}
        document["images"].append(image)
        masks = [rectangle(rng, height, width) for _ in range(rng.integers(most_objects + 1))]
        for mask in masks:
            crowd = rng.random() < 0.15
            segmentation = rle(mask)
            area, box = float(mask.sum()), mask_util.toBbox(segmentation).tolist()
            if not crowd and rng.random() < 0.3:
                x, y, w, h = box
                corners = np.array([x, y, x + w, y, x + w, y + h, x, y + h])
                segmentation = [(corners + rng.normal(size=8)).tolist()]
            if rng.random() < 0.2:
                area = float(rng.choice([1024, 1023.9, 1024.1, 9216, 9216.5]))
            annotation = {"id": len(document["annotations"]) + 1, "image_id": image_id}
            annotation |= {"category_id": int(rng.integers(1, classes + 1)), "iscrowd": int(crowd)}
            annotation |= {"segmentation": segmentation, "area": area, "bbox": box}
            document["annotations"].append(annotation)
        if rng.random() < 0.2:
            continue
        for _ in range(rng.integers(most_results + 1)):
            mask = rectangle(rng, height, width)
            if masks and rng.random() < 0.7:
                mask = np.roll(masks[rng.integers(len(masks))], rng.integers(-2, 3, 2), (0, 1))
            if rng.random() < 0.03:
                mask[:] = 0
            tied, segmentation = float(rng.integers(levels)) / levels, rle(mask)
            result = {"image_id": image_id, "category_id": int(rng.integers(1, classes + 1))}
            result["score"] = tied if rng.random() < 0.7 else float(rng.random())
            result |= {"segmentation": segmentation}
            result["bbox"] = mask_util.toBbox(segmentation).tolist()
            results.append(result)
    return document, results


def coco(document):
    result = COCO()
    result.dataset = copy.deepcopy(document)
    result.createIndex()
    return result


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_the_fast_evaluation_equals_pycocotools(iou_type):
    pytest.importorskip("faster_coco_eval")
    compared = 0
    for seed in range(36):
        document, results = random_data(seed)
        before = copy.deepcopy(results)
        options = {"max_dets": (2, 5, 30)} if seed % 3 == 0 else {}
        if seed % 5 == 0:
            options["image_ids"] = [x["id"] for x in document["images"][::2]]
        slow, fast = (
            evaluate_coco(coco(document), results, iou_type, fast=fast, **options)
            for fast in (False, True)
        )
        assert results == before
        # pycocotools adds 2.2e-16 to a denominator, faster-coco-eval does not
        for name in ("precision", "recall", "scores"):
            np.testing.assert_allclose(fast.eval[name], slow.eval[name], rtol=0, atol=3e-16)
        np.testing.assert_allclose(fast.stats, slow.stats, rtol=0, atol=1e-15)
        compared += len(results)
    assert compared > 5000


class Perfect:
    """Predictions made from the ground truth, some of them damaged."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)

    def __call__(self, record):
        size = record["height"], record["width"]
        masks, classes = [torch.zeros(0, *size, dtype=torch.bool)], []
        for annotation in record["annotations"]:
            segmentation = annotation["segmentation"]
            if isinstance(segmentation, list):
                segmentation = mask_util.merge(mask_util.frPyObjects(segmentation, *size))
            mask = np.roll(mask_util.decode(segmentation), self.rng.integers(3), 0)
            masks.append(torch.as_tensor(mask).bool()[None])
            classes.append(annotation["category_id"])
        instances = Instances(size)
        instances.pred_masks = torch.cat(masks)
        instances.pred_classes = torch.tensor(classes, dtype=torch.long)
        instances.scores = torch.tensor(self.rng.random(len(classes)))
        instances.pred_boxes = Boxes(torch.rand(len(classes), 4).cumsum(1) * 20)
        return {"instances": instances}


@pytest.mark.parametrize("found", ["all", "nothing"])
def test_the_evaluator_gives_detectron2s_results_and_files(shapes_val, tmp_path, found):
    records = shapes_val(6)
    outputs = [Perfect(i)(record) for i, record in enumerate(records)]
    if found == "nothing":
        outputs = [{"instances": x["instances"][:0]} for x in outputs]
    results = {}
    for evaluator_class in (COCOEvaluator, InstanceEvaluator):
        folder = tmp_path / evaluator_class.__name__
        evaluator = evaluator_class("shapes_val", output_dir=str(folder))
        evaluator.reset()
        evaluator.process(records, copy.deepcopy(outputs))
        results[evaluator_class] = evaluator.evaluate()
    files = [tmp_path / c.__name__ / "coco_instances_results.json" for c in results]
    first, second = (json.loads(file.read_text()) for file in files)
    assert first == second
    ours, theirs = results[InstanceEvaluator], results[COCOEvaluator]
    assert ours.keys() == {"bbox", "segm"}
    if found == "all":
        for task, metrics in theirs.items():
            assert ours[task] == pytest.approx(metrics, rel=1e-12, nan_ok=True)
        assert ours["segm"]["AP50"] > 50
        ids = set(MetadataCatalog.get("shapes_val").thing_dataset_id_to_contiguous_id)
        assert {x["category_id"] for x in second} <= ids
    else:
        # 0 where there are objects to find; there are no large objects
        assert ours["segm"]["AP"] == ours["segm"]["AP50"] == 0
        assert np.isnan(ours["segm"]["APl"])
