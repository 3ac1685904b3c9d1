"""What the reader accepts works until the end: a step of training, and AP 100 for the truth."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.modeling import build_model
from detectron2.structures import Boxes, BoxMode, Instances
from detectron2.utils.events import EventStorage
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from solo_d2.config import load_config
from solo_d2.data import InstanceMapper, register_coco_json, setup_datasets
from solo_d2.data.annotations import to_rle
from solo_d2.data.catalog import check_image_headers
from solo_d2.data.coco import REFUSED, REPAIRED, SKIPPED, read_coco
from solo_d2.errors import UserError
from solo_d2.tools.check import check

REPOSITORY = Path(__file__).resolve().parents[2]
CASES = Path(os.environ.get("SOLO_D2_CASES") or REPOSITORY / "../shared/cases").resolve()

pytestmark = [
    pytest.mark.usefixtures("catalogs"),
    pytest.mark.filterwarnings("ignore:The given NumPy array is not writable"),
]


def true_instances(record):
    """A perfect prediction."""
    size = record["height"], record["width"]
    objects = [a for a in record["annotations"] if not a["iscrowd"]]
    instances = Instances(size)
    boxes = [BoxMode.convert(a["bbox"], BoxMode.XYWH_ABS, BoxMode.XYXY_ABS) for a in objects]
    instances.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    instances.scores = torch.ones(len(objects))
    instances.pred_classes = torch.tensor([a["category_id"] for a in objects], dtype=torch.long)
    if all("segmentation" in a for a in objects):
        masks = [mask_util.decode(to_rle(a["segmentation"], *size)) for a in objects]
        instances.pred_masks = torch.from_numpy(np.array(masks).reshape(-1, *size)).bool()
    return instances


def truth_of(name):
    """Detectron2's metrics for the ground truth itself."""
    records = DatasetCatalog.get(name)
    outputs = [{"instances": true_instances(r)} for r in records]
    masks = all("segmentation" in a for r in records for a in r["annotations"])  # crowds too
    evaluator = COCOEvaluator(name, tasks=("bbox", "segm")[: 1 + masks], distributed=False)
    evaluator.reset()
    evaluator.process(records, outputs)
    return {task: metrics["AP"] for task, metrics in evaluator.evaluate().items()}


def count(records):
    return sum(not a["iscrowd"] for r in records for a in r["annotations"])


# --- documents with any mutation

NUMBERS = [-1, 0, 1, 2, 7, 3.0, 1.5, -2.5, 1e300, float("nan"), float("inf"), 10**400]
TEXTS = ["7", "0", "x", "", "false", "1e3", "a\\b.png", "../a.png", "\x00", "\ud800", "1_0"]
ANYTHING = st.sampled_from([None, True, False, [], {}, [1], [[1, 2]], *NUMBERS, *TEXTS])
SECTIONS = st.sampled_from(["images", "annotations", "annotations", "annotations", "categories"])


def mutate(document, data):
    """Change, remove or repeat something in the document, at any depth."""
    section = document[data.draw(SECTIONS)]
    index = data.draw(st.integers(0, len(section) - 1))
    kind = data.draw(st.sampled_from(["set", "set", "set", "remove", "repeat"]))
    if kind == "repeat":
        section.append(copy.deepcopy(section[index]))
        return
    holder, key = section, index
    while isinstance(holder[key], (dict, list)) and len(holder[key]):
        if holder is not section and data.draw(st.booleans()):
            break
        holder = holder[key]
        keys = sorted(holder) if isinstance(holder, dict) else range(len(holder))
        key = data.draw(st.sampled_from(list(keys)))
    if kind == "remove":
        del holder[key]
    else:
        holder[key] = data.draw(ANYTHING)


@pytest.fixture(scope="module")
def trained():
    """By whether it predicts masks: the mapper of a small model, and a step of its training."""

    def make(name):
        cfg = configure((), name, INPUT__MIN_SIZE_TRAIN=(40,))  # for the five classes of shapes
        model = build_model(cfg).train()

        def step(examples):
            model.zero_grad()
            with EventStorage():
                losses = model(examples)
            sum(losses.values()).backward()
            gradients = [p.grad for p in model.parameters() if p.requires_grad]
            assert all(x.isfinite().all() for x in (*losses.values(), *gradients))

        return InstanceMapper(cfg), step

    return {True: make("yolact_shapes.yaml"), False: make("fcos_shapes.yaml")}


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data(), mutations=st.integers(1, 3), masks=st.booleans())
def test_a_mutated_document_is_refused_in_one_line_or_works(
    document, write, trained, data, mutations, masks
):
    json_file, folder = write(document)
    mutated = copy.deepcopy(document)
    for _ in range(mutations):
        if all(mutated.values()):
            mutate(mutated, data)
    json_file.write_text(json.dumps(mutated))
    try:
        register_coco_json("mutated", json_file, folder, masks=masks)
        records = DatasetCatalog.get("mutated")
        check_image_headers(records)
    except (ValueError, OSError) as error:
        assert str(json_file) in str(error) or str(folder) in str(error)
        assert "\n" not in str(error)
        return
    again = read_coco(MetadataCatalog.get("mutated").json_file, folder, masks=masks)
    assert {e for e, _ in again.findings} <= {SKIPPED} and not again.changed
    mapper, step = trained[masks]
    examples = [mapper(record) for record in records]
    crowds = mapper.keep_crowd * sum(a["iscrowd"] for r in records for a in r["annotations"])
    assert sum(len(x["instances"]) for x in examples) == count(records) + crowds
    if examples:
        step(examples)
    for ap in truth_of("mutated").values() if count(records) else ():
        assert ap == pytest.approx(100)


# --- documents as real tools write them

EFFECTS = {
    "plain": set(),
    "bom": {REPAIRED},
    "text_image_ids": {REPAIRED},
    "sixteen_bit": {REPAIRED},
    "truncated_val": {REFUSED},
    "fraction_boxes": {REPAIRED},
    "brush_crowds": {REFUSED, SKIPPED},
    "points_in_pairs": {REPAIRED},
    "text_coordinates": {REPAIRED},
    "boxes_only": {REFUSED, SKIPPED},
    "text_iscrowd": {REPAIRED},
    "numeric_names": {REPAIRED},
}


def make(case, folder):
    if not CASES.is_dir():
        pytest.skip(f"no folder {CASES} (set SOLO_D2_CASES)")
    subprocess.run([sys.executable, CASES / "make.py", case, folder], check=True)
    return [str(folder / s / x) for s in ("train", "val") for x in ("ann.json", "images")]


def configure(data, name="yolact_shapes.yaml", **options):
    opts = [x for key, value in options.items() for x in (key.replace("__", "."), value)]
    return load_config(str(REPOSITORY / "configs/quick" / name), data=data, opts=opts)


@pytest.mark.parametrize("case", EFFECTS)
def test_check_says_what_training_makes_of_it(case, tmp_path):
    reports = check(configure(make(case, tmp_path)), decode_images=True)
    found = {e for r in reports for e, _ in r.findings} & {REFUSED, SKIPPED, REPAIRED}
    assert found == EFFECTS[case]


@pytest.mark.parametrize(
    "case",
    [case for case in EFFECTS if case not in ("truncated_val", "brush_crowds", "boxes_only")],
)
def test_it_trains_and_evaluates_as_the_plain_set(case, tmp_path):
    cfg = configure(make(case, tmp_path))
    setup_datasets(cfg)
    train, val = (DatasetCatalog.get(f"custom_{split}") for split in ("train", "val"))
    assert (len(train), count(train), len(val), count(val)) == (6, 18, 3, 9)
    mapper = InstanceMapper(cfg)
    examples = [mapper(record) for record in train]
    assert all(len(x["instances"]) == 3 for x in examples)
    assert all(20 < x["image"].float().mean() < 120 for x in examples)
    assert truth_of("custom_val") == pytest.approx({"bbox": 100, "segm": 100})
    names = ["0", "1"] if case == "numeric_names" else ["square", "round"]
    assert MetadataCatalog.get("custom_val").thing_classes == names
    plain = read_coco(make("plain", tmp_path / "plain")[2])
    read = read_coco(MetadataCatalog.get("custom_val").json_file)
    for a, b in zip(plain.document["annotations"], read.document["annotations"], strict=True):
        assert b["bbox"] == pytest.approx(a["bbox"])
        assert b["area"] == pytest.approx(a["area"])


def test_a_truncated_image_is_named(tmp_path):
    cfg = configure(make("truncated_val", tmp_path))
    setup_datasets(cfg)
    mapper = InstanceMapper(cfg, is_train=False)
    with pytest.raises(UserError, match="val/images/im002.png: cannot be read .*truncated"):
        list(map(mapper, DatasetCatalog.get("custom_val")))


def test_brush_crowds_are_refused_by_that_name_or_taken_for_objects(tmp_path):
    data = make("brush_crowds", tmp_path)
    with pytest.raises(ValueError, match="crowd regions"):
        setup_datasets(configure(data))
    setup_datasets(configure(data, DATASETS__CUSTOM__CROWD_IS_OBJECT=True))
    assert count(DatasetCatalog.get("custom_train")) == 18
    assert truth_of("custom_val") == pytest.approx({"bbox": 100, "segm": 100})


def test_boxes_only_train_a_box_detector(tmp_path):
    data = make("boxes_only", tmp_path)
    with pytest.raises(ValueError, match=r"no segmentation: 18 \(without MODEL.MASK_ON"):
        setup_datasets(configure(data))
    cfg = configure(data, "fcos_shapes.yaml")
    setup_datasets(cfg)
    records = DatasetCatalog.get("custom_train")
    instances = [InstanceMapper(cfg)(record)["instances"] for record in records]
    assert sum(map(len, instances)) == 18 and not instances[0].has("gt_masks")
    assert truth_of("custom_val") == pytest.approx({"bbox": 100})
    assert {e for r in check(cfg) for e, _ in r.findings} <= {"remark"}


def test_images_of_another_size_in_the_validation_set_are_found_at_once(document, write):
    train, val = write(document, "train"), write(document, "val")
    Image.new("RGB", (30, 30)).save(val[1] / "b.png")
    with pytest.raises(ValueError, match=r"b.png: 30 x 30 pixels, but the json says 60 x 40"):
        setup_datasets(configure([str(x) for x in (*train, *val)]))
