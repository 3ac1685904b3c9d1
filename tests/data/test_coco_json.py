"""Users' COCO json files: registered, checked, and the same for training and evaluation."""

import copy
import json
import logging
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import BitMasks, Boxes, Instances
from PIL import Image
from pycocotools.coco import COCO

from solo_d2.config import add_solo_d2_config
from solo_d2.data import (
    SHAPES,
    register_coco_json,
    register_coco_mini,
    setup_datasets,
)
from solo_d2.modeling.num_classes import dataset_num_classes

HEIGHT, WIDTH = 40, 60
REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def catalogs(tmp_path, monkeypatch):
    """A cache of the test's own, and the catalogs as they were afterwards."""
    monkeypatch.setenv("SOLO_D2_CACHE", str(tmp_path / "cache"))
    before = dict(DatasetCatalog.data), dict(MetadataCatalog.data)
    yield
    DatasetCatalog.data, MetadataCatalog.data = before


@pytest.fixture
def document():
    """Two images of two, and one, objects; one RLE; categories neither sorted nor contiguous."""
    mask = np.zeros((HEIGHT, WIDTH), np.uint8, order="F")
    mask[5:15, 20:40] = 1
    rle = mask_util.encode(mask)
    return {
        "images": [
            {"id": 7, "file_name": "b.png", "height": HEIGHT, "width": WIDTH},
            {"id": 3, "file_name": "a.png", "height": HEIGHT, "width": WIDTH},
        ],
        "annotations": [
            {
                "id": 11,
                "image_id": 7,
                "category_id": 9,
                "bbox": [2, 3, 10, 20],
                "area": 200,
                "iscrowd": 0,
                "segmentation": [[2, 3, 12, 3, 12, 23, 2, 23]],
            },
            {
                "id": 12,
                "image_id": 7,
                "category_id": 4,
                "bbox": [20, 5, 20, 10],
                "area": 200,
                "iscrowd": 0,
                "segmentation": {"size": [HEIGHT, WIDTH], "counts": rle["counts"].decode()},
            },
            {
                "id": 13,
                "image_id": 3,
                "category_id": 4,
                "bbox": [0, 0, 1, HEIGHT],
                "area": HEIGHT,
                "iscrowd": 1,
                "segmentation": {
                    "size": [HEIGHT, WIDTH],
                    "counts": [0, HEIGHT, HEIGHT * (WIDTH - 1)],
                },
            },
        ],
        "categories": [{"id": 9, "name": "cat"}, {"id": 4, "name": "dog"}],
    }


@pytest.fixture
def write(tmp_path):
    def write(document, name="set", images=True):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        json_file = tmp_path / f"{name}.json"
        json_file.write_text(document if isinstance(document, str) else json.dumps(document))
        if images:
            for image in document["images"]:
                Image.new("RGB", (WIDTH, HEIGHT)).save(folder / image["file_name"])
        return json_file, folder

    return write


def load(document, write, name="custom"):
    register_coco_json(name, *write(document))
    return DatasetCatalog.get(name), MetadataCatalog.get(name)


def evaluator_annotations(name):
    return COCOEvaluator(name)._coco_api.dataset["annotations"]


# --- good files


def test_a_good_file_becomes_records_and_metadata(document, write, caplog):
    json_file, folder = write(document)
    with caplog.at_level(logging.WARNING):
        records, metadata = load(document, write)
    assert caplog.records == []
    assert metadata.thing_classes == ["dog", "cat"]
    assert metadata.thing_dataset_id_to_contiguous_id == {4: 0, 9: 1}
    assert metadata.json_file == str(json_file)  # nothing to tidy: the evaluator reads the file
    assert metadata.image_root == str(folder)
    assert metadata.evaluator_type == "coco"
    assert [(r["image_id"], r["file_name"]) for r in records] == [
        (7, str(folder / "b.png")),
        (3, str(folder / "a.png")),
    ]
    annotations = [a for r in records for a in r["annotations"]]
    assert [a["category_id"] for a in annotations] == [1, 0, 0]
    assert [a["iscrowd"] for a in annotations] == [0, 0, 1]
    assert annotations[0]["segmentation"] == document["annotations"][0]["segmentation"]


def test_records_pass_through_detectron2s_mapper(document, write):
    records, _ = load(document, write)
    mapper = DatasetMapper(
        True, augmentations=[], image_format="BGR", use_instance_mask=True,
        instance_mask_format="bitmask",
    )  # fmt: skip
    instances = mapper(records[0])["instances"]
    assert instances.gt_classes.tolist() == [1, 0]
    assert instances.gt_masks.tensor.sum((1, 2)).tolist() == [200, 200]
    assert len(mapper(records[1])["instances"]) == 0  # a crowd only


def test_loading_twice_gives_the_same(document, write):
    first, _ = load(document, write)
    second = DatasetCatalog.get("custom")
    assert first == second
    assert first is not second


def test_registering_a_name_again_replaces_it(document, write):
    load(document, write)
    other = copy.deepcopy(document)
    other["categories"][0]["name"] = "horse"
    other["annotations"].pop()
    records, metadata = load(other, write)
    assert metadata.thing_classes == ["dog", "horse"]
    assert sum(len(r["annotations"]) for r in records) == 2


def test_no_annotations_is_ordinary(document, write):
    document["annotations"] = []
    records, metadata = load(document, write)
    assert [r["annotations"] for r in records] == [[], []]
    assert len(metadata.thing_classes) == 2


# --- what is tolerated: completed, or skipped, in training and evaluation alike


@pytest.mark.parametrize("key", ["iscrowd", "area", "bbox"])
def test_missing_keys_are_completed_for_the_evaluator_too(document, write, key, caplog):
    expected = copy.deepcopy(document)
    del document["annotations"][0][key]
    del document["annotations"][1][key]
    with caplog.at_level(logging.WARNING):
        records, metadata = load(document, write)
    (warning,) = caplog.messages
    assert "completed or corrected 2 annotations" in warning
    assert metadata.json_file != str(write(document)[0])
    assert metadata.json_file in warning
    assert evaluator_annotations("custom") == expected["annotations"]
    assert records[0]["annotations"][0]["bbox"] == [2, 3, 10, 20]
    assert records[0]["annotations"][0]["iscrowd"] == 0


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"bbox": [5, 5, 0, 4]}, "1 with a box without area"),
        ({"bbox": [5, 5, 4, -1]}, "1 with a box without area"),
        ({"bbox": [5, 5, float("nan"), 4]}, "1 with a box without area"),
        ({"bbox": [WIDTH, 5, 4, 4]}, "1 with a box outside of the image"),
        ({"bbox": [-4, 5, 4, 4]}, "1 with a box outside of the image"),
        ({"segmentation": [[1, 1, 5, 5]]}, "1 with a degenerate polygon"),
        ({"segmentation": [[1, 1, 5, 5, 1, 5, 2]]}, "1 with a degenerate polygon"),
        ({"segmentation": [[]]}, "1 with a degenerate polygon"),
        ({"segmentation": []}, "1 with no segmentation"),
        ({"segmentation": None}, "1 with no segmentation"),
        (
            {"segmentation": {"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH]}},
            "1 with an empty mask",
        ),
    ],
)
def test_useless_annotations_are_skipped_with_one_warning(document, write, change, reason, caplog):
    document["annotations"][0].update(change)
    with caplog.at_level(logging.WARNING):
        records, _ = load(document, write)
    (warning,) = caplog.messages
    assert str(write(document)[0]) in warning
    assert f"skipped 1 of 3 annotations ({reason})" in warning
    assert [len(r["annotations"]) for r in records] == [1, 1]
    assert [a["id"] for a in evaluator_annotations("custom")] == [12, 13]


def test_one_warning_counts_everything(document, write, caplog):
    document["annotations"][0]["bbox"] = [5, 5, 0, 4]
    document["annotations"][1]["bbox"] = [5, 5, 0, 4]
    del document["annotations"][2]["segmentation"]
    with caplog.at_level(logging.WARNING):
        records, _ = load(document, write)
    (warning,) = caplog.messages
    assert "skipped 3 of 3 annotations (2 with a box without area, 1 with no seg" in warning
    assert [len(r["annotations"]) for r in records] == [0, 0]


def test_a_degenerate_part_of_a_good_mask_is_left_out(document, write):
    good = document["annotations"][0]["segmentation"][0]
    document["annotations"][0]["segmentation"] = [good, [1, 1, 2, 2]]
    records, _ = load(document, write)
    assert records[0]["annotations"][0]["segmentation"] == [good]
    assert evaluator_annotations("custom")[0]["segmentation"] == [good]


def test_an_annotation_with_id_zero_counts_in_the_evaluation(document, write, caplog):
    """pycocotools takes the match with a ground truth of id 0 for none."""
    document["annotations"] = document["annotations"][:1]
    document["annotations"][0]["id"] = 0
    with caplog.at_level(logging.WARNING):
        records, metadata = load(document, write)
    assert "numbered the annotations anew" in caplog.text
    evaluator = COCOEvaluator("custom", tasks=("segm",), distributed=False)
    evaluator.reset()
    perfect = Instances((HEIGHT, WIDTH))
    masks = torch.zeros((1, HEIGHT, WIDTH), dtype=torch.bool)
    masks[0, 3:23, 2:12] = True
    perfect.pred_masks = masks
    perfect.pred_boxes = Boxes(BitMasks(masks).get_bounding_boxes().tensor)
    perfect.scores = torch.ones(1)
    perfect.pred_classes = torch.ones(1, dtype=torch.long)
    evaluator.process(records[:1], [{"instances": perfect}])
    assert evaluator.evaluate()["segm"]["AP"] == pytest.approx(100)


def test_the_copy_depends_on_the_content_and_the_source_stays(document, write, tmp_path):
    del document["annotations"][0]["area"]
    json_file, _ = write(document)
    before = json_file.read_bytes()
    register_coco_json("custom", json_file, tmp_path)
    assert json_file.read_bytes() == before
    _, first = load(document, write)
    _, again = load(document, write)
    assert first.json_file == again.json_file
    document["annotations"].pop()
    _, second = load(document, write)
    assert second.json_file != first.json_file
    copies = list((tmp_path / "cache" / "tidied").iterdir())
    assert sorted(map(str, copies)) == sorted([first.json_file, second.json_file])


# --- what is refused


def one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_missing_json_is_named(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        register_coco_json("custom", tmp_path / "gone.json", tmp_path)
    assert str(tmp_path / "gone.json") in one_line(error)


def test_a_missing_image_folder_is_named(document, write, tmp_path):
    json_file, _ = write(document)
    with pytest.raises(FileNotFoundError) as error:
        register_coco_json("custom", json_file, tmp_path / "gone")
    assert str(tmp_path / "gone") in one_line(error)


@pytest.mark.parametrize(
    "text",
    ["", "hello", "[]", "3", "{}", '{"images": [], "annotations": []}', '{"images": 3}'],
)
def test_other_files_are_not_taken_for_coco(write, text):
    json_file, folder = write(text, images=False)
    with pytest.raises(ValueError, match="is not a (COCO )?json") as error:
        register_coco_json("custom", json_file, folder)
    assert str(json_file) in one_line(error)


def test_missing_images_are_counted_and_named(document, write):
    document["images"] += [
        {"id": 100 + i, "file_name": f"gone{i}.png", "height": HEIGHT, "width": WIDTH}
        for i in range(5)
    ]
    json_file, folder = write(document)
    for i in range(5):
        (folder / f"gone{i}.png").unlink()
    register_coco_json("custom", json_file, folder)
    with pytest.raises(FileNotFoundError) as error:
        DatasetCatalog.get("custom")
    message = one_line(error)
    assert str(json_file) in message
    assert "5 of 7 images are missing" in message
    assert str(folder / "gone0.png") in message
    assert "gone4.png" not in message


def annotation_error(document, write):
    json_file, folder = write(document)
    with pytest.raises(ValueError) as error:
        register_coco_json("custom", json_file, folder)
    message = one_line(error)
    assert str(json_file) in message
    return message


def test_an_unknown_category_is_named(document, write):
    document["annotations"][1]["category_id"] = 5
    message = annotation_error(document, write)
    assert "annotation 12 of image 7: category id 5 is not among the categories" in message


def test_an_unknown_image_is_named(document, write):
    document["annotations"][1]["image_id"] = 70
    assert "annotation 12 of image 70: there is no such image" in annotation_error(document, write)


@pytest.mark.parametrize("section", ["images", "annotations", "categories"])
def test_an_id_used_twice_is_named(document, write, section):
    document[section][1]["id"] = document[section][0]["id"]
    identity = document[section][0]["id"]
    assert f"id {identity} appears twice in '{section}'" in annotation_error(document, write)


@pytest.mark.parametrize(
    ("section", "key"),
    [("images", "height"), ("images", "file_name"), ("annotations", "image_id")]
    + [("annotations", "id"), ("annotations", "category_id"), ("categories", "name")],
)
def test_a_missing_key_is_named(document, write, section, key):
    json_file, folder = write(document)
    del document[section][1][key]
    json_file.write_text(json.dumps(document))
    with pytest.raises(ValueError) as error:
        register_coco_json("custom", json_file, folder)
    assert one_line(error) == f"{json_file}: {section}[1] has no {key!r}"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"bbox": [1, 2, 3]}, "its bbox [1, 2, 3] is not"),
        ({"bbox": []}, "its bbox [] is not"),
        ({"bbox": ["1", 2, 3, 4]}, "is not [x, y, width, height]"),
        ({"segmentation": [1, 1, 9, 1, 9, 9]}, "must be a list of polygons"),
        ({"segmentation": {"size": [9, 9], "counts": [0, 81]}}, "its mask is [9, 9], but"),
        ({"segmentation": {"size": [HEIGHT, WIDTH], "counts": [3, 4]}}, "do not add up"),
        ({"segmentation": {"size": [HEIGHT, WIDTH]}}, "counts"),
        ({"segmentation": {"size": [HEIGHT, WIDTH], "counts": "Q=0"}}, "do not add up"),
        ({"segmentation": [[1, 1, 9, 1, 9, float("inf")]]}, "must be numbers of pixels"),
        ({"ignore": 1}, '"iscrowd": 1'),
    ],
)
def test_a_malformed_annotation_is_named(document, write, change, complaint):
    document["annotations"][1].update(change)
    message = annotation_error(document, write)
    assert "annotation 12 of image 7" in message
    assert complaint in message


def test_a_file_without_categories_is_refused(document, write):
    document["categories"], document["annotations"] = [], []
    assert "has no categories" in annotation_error(document, write)


# --- from the config


@pytest.fixture
def cfg():
    cfg = get_cfg()
    add_solo_d2_config(cfg)
    return cfg


def set_custom(cfg, train=None, val=None, name="mine"):
    cfg.DATASETS.CUSTOM.NAME = name
    if train:
        cfg.DATASETS.CUSTOM.TRAIN_JSON, cfg.DATASETS.CUSTOM.TRAIN_IMAGES = map(str, train)
    if val:
        cfg.DATASETS.CUSTOM.VAL_JSON, cfg.DATASETS.CUSTOM.VAL_IMAGES = map(str, val)


def test_custom_sets_replace_those_of_the_config(cfg, document, write):
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("coco_2017_train",), ("coco_2017_val",)
    set_custom(cfg, train=write(document, "train"), val=write(document, "val"))
    setup_datasets(cfg)
    setup_datasets(cfg)  # harmless
    assert cfg.DATASETS.TRAIN == ("mine_train",)
    assert cfg.DATASETS.TEST == ("mine_val",)
    assert dataset_num_classes(cfg) == 2
    assert len(DatasetCatalog.get("mine_train")) == len(DatasetCatalog.get("mine_val")) == 2


@pytest.mark.parametrize(("split", "expected"), [("train", (1, 0)), ("val", (0, 1))])
def test_one_custom_set_leaves_the_other_empty(cfg, document, write, split, expected):
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("coco_2017_train",), ("coco_2017_val",)
    set_custom(cfg, **{split: write(document)})
    setup_datasets(cfg)
    assert (len(cfg.DATASETS.TRAIN), len(cfg.DATASETS.TEST)) == expected
    assert dataset_num_classes(cfg) == 2


def test_relative_paths_are_found_under_detectron2_datasets(
    cfg, document, write, tmp_path, monkeypatch
):
    write(document)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    set_custom(cfg, train=("set.json", "set"))
    setup_datasets(cfg)
    assert len(DatasetCatalog.get("mine_train")) == 2
    # the working directory goes first
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    document["categories"] += [{"id": 20, "name": "cow"}]
    Path("set.json").write_text(json.dumps(document))
    setup_datasets(cfg)
    assert dataset_num_classes(cfg) == 3


def test_a_missing_custom_file_is_named_with_its_key_and_places(cfg, tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    set_custom(cfg, train=("gone.json", "gone"))
    with pytest.raises(FileNotFoundError) as error:
        setup_datasets(cfg)
    message = one_line(error)
    assert "DATASETS.CUSTOM.TRAIN_JSON" in message
    assert f"gone.json nor {tmp_path / 'gone.json'}" in message


@pytest.mark.parametrize("given", ["VAL_JSON", "VAL_IMAGES"])
def test_half_a_custom_set_is_refused(cfg, given):
    cfg.DATASETS.CUSTOM[given] = "somewhere"
    lacking = {"VAL_JSON": "VAL_IMAGES", "VAL_IMAGES": "VAL_JSON"}[given]
    with pytest.raises(ValueError, match=f"CUSTOM.{lacking} is empty, but {given}"):
        setup_datasets(cfg)


@pytest.mark.parametrize("mismatch", ["another name", "one more", "another order"])
def test_train_and_val_must_have_the_same_classes(cfg, document, write, mismatch):
    train = write(document, "train")
    if mismatch == "another name":
        document["categories"][0]["name"] = "horse"
    elif mismatch == "one more":
        document["categories"].append({"id": 12, "name": "horse"})
    else:
        document["categories"] = [{"id": 4, "name": "cat"}, {"id": 9, "name": "dog"}]
    val = write(document, "val")
    set_custom(cfg, train, val)
    with pytest.raises(ValueError, match="must have the same classes") as error:
        setup_datasets(cfg)
    message = one_line(error)
    assert str(train[0]) in message
    assert str(val[0]) in message
    if mismatch == "one more":
        assert "2 and 3; class 2 is 'nothing' in one and 'horse' in the other" in message


def test_ids_may_differ_between_train_and_val(cfg, document, write):
    train = write(document, "train")
    for entry in document["annotations"]:
        entry["category_id"] += 100
    for entry in document["categories"]:
        entry["id"] += 100
    set_custom(cfg, train, write(document, "val"))
    setup_datasets(cfg)
    classes = [
        [a["category_id"] for r in DatasetCatalog.get(f"mine_{s}") for a in r["annotations"]]
        for s in ("train", "val")
    ]
    assert classes[0] == classes[1]


def test_shapes_take_the_parameters_of_the_config(cfg):
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("shapes_train",), ("shapes_val",)
    cfg.DATASETS.SHAPES.TRAIN_IMAGES = 3
    cfg.DATASETS.SHAPES.VAL_IMAGES = 2
    cfg.DATASETS.SHAPES.IMAGE_SIZE = (64, 80)
    setup_datasets(cfg)
    assert cfg.DATASETS.TRAIN == ("shapes_train",)
    assert dataset_num_classes(cfg) == 5
    records = DatasetCatalog.get("shapes_train")
    assert len(records) == 3
    assert (records[0]["height"], records[0]["width"]) == (64, 80)
    assert len(DatasetCatalog.get("shapes_val")) == 2


def test_num_classes_falls_back_to_the_test_set_and_says_when_unknown(cfg):
    SHAPES.register()
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("unheard_of",), ("shapes_val",)
    assert dataset_num_classes(cfg) == 5
    cfg.DATASETS.TEST = ()
    with pytest.raises(ValueError, match="number of classes is unknown.*unheard_of"):
        dataset_num_classes(cfg)


# --- real data


@pytest.mark.parametrize("name", ["pennfudan", "nuclei"])
def test_configs_of_the_real_sets_load(cfg, data_dir, monkeypatch, name, caplog):
    if not (data_dir / name).is_dir():
        pytest.skip(f"no folder {data_dir / name} (set SOLO_D2_DATA)")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(data_dir))
    cfg.merge_from_file(str(REPOSITORY / "configs" / name / f"Base-{name}.yaml"))
    with caplog.at_level(logging.WARNING):
        setup_datasets(cfg)
    assert caplog.records == []
    assert cfg.DATASETS.TRAIN == (f"{name}_train",)
    assert dataset_num_classes(cfg) == 1
    for split, dataset in (("train", cfg.DATASETS.TRAIN[0]), ("val", cfg.DATASETS.TEST[0])):
        source = json.loads((data_dir / name / f"annotations/instances_{split}.json").read_text())
        records = DatasetCatalog.get(dataset)
        assert len(records) == len(source["images"])
        count = sum(len(r["annotations"]) for r in records)
        assert count == len(source["annotations"])


def test_coco_mini_loads_with_cocos_classes(cfg, data_dir, monkeypatch, caplog):
    if not (data_dir / "coco_mini").is_dir():
        pytest.skip(f"no folder {data_dir / 'coco_mini'} (set SOLO_D2_DATA)")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(data_dir))
    register_coco_mini()
    cfg.merge_from_file(str(REPOSITORY / "configs/coco_mini/Base-coco_mini.yaml"))
    setup_datasets(cfg)
    assert dataset_num_classes(cfg) == 80
    with caplog.at_level(logging.WARNING):
        for dataset, split in ((cfg.DATASETS.TRAIN[0], "train"), (cfg.DATASETS.TEST[0], "val")):
            file = data_dir / "coco_mini" / f"annotations/instances_{split}2017.json"
            source = json.loads(file.read_text())
            records = DatasetCatalog.get(dataset)
            assert len(records) == len(source["images"])
            count = sum(len(r["annotations"]) for r in records)
            assert count == len(source["annotations"])
            names = {c["id"]: c["name"] for c in source["categories"]}
            classes = MetadataCatalog.get(dataset).thing_classes
            by_image = {r["image_id"]: iter(r["annotations"]) for r in records}
            for annotation in source["annotations"]:
                loaded = next(by_image[annotation["image_id"]])
                assert classes[loaded["category_id"]] == names[annotation["category_id"]]
    assert caplog.records == []


def test_coco_mini_names_what_is_missing(tmp_path):
    register_coco_mini(tmp_path)
    with pytest.raises(FileNotFoundError, match="no annotations file .*instances_val2017.json"):
        DatasetCatalog.get("coco_mini_val")


@pytest.fixture
def twelve_shapes(tmp_path, monkeypatch):
    """A config that trains on twelve drawn images."""
    monkeypatch.setenv("SOLO_D2_CACHE", str(tmp_path))
    cfg = get_cfg()
    add_solo_d2_config(cfg)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("shapes_train",), ("shapes_val",)
    cfg.DATASETS.SHAPES.TRAIN_IMAGES, cfg.DATASETS.SHAPES.IMAGE_SIZE = 12, (64, 64)
    return cfg


def test_overfitting_trains_and_evaluates_on_the_same_first_images(twelve_shapes):
    cfg = twelve_shapes
    cfg.DATASETS.OVERFIT_IMAGES = 3
    setup_datasets(cfg)
    assert cfg.DATASETS.TRAIN == cfg.DATASETS.TEST == ("shapes_train_first3",)
    records = DatasetCatalog.get("shapes_train_first3")
    metadata = MetadataCatalog.get("shapes_train_first3")
    ground_truth = COCO(metadata.json_file)
    assert [r["image_id"] for r in records] == ground_truth.getImgIds()
    assert all(r["annotations"] for r in records) and len(records) == 3
    assert sum(len(r["annotations"]) for r in records) == len(ground_truth.anns)
    assert metadata.thing_classes == MetadataCatalog.get("shapes_train").thing_classes

    cfg.DATASETS.TRAIN, cfg.DATASETS.OVERFIT_IMAGES = ("shapes_train",), 13
    with pytest.raises(ValueError, match="not 13"):
        setup_datasets(cfg)


def test_overfitting_takes_images_by_their_ids(twelve_shapes):
    cfg = twelve_shapes
    setup_datasets(cfg)
    ids = sorted(r["image_id"] for r in DatasetCatalog.get("shapes_train"))
    cfg.DATASETS.OVERFIT_IMAGE_IDS = (ids[7], ids[2])
    setup_datasets(cfg)
    (name,) = cfg.DATASETS.TRAIN
    assert cfg.DATASETS.TEST == (name,)
    assert sorted(r["image_id"] for r in DatasetCatalog.get(name)) == [ids[2], ids[7]]
    assert sorted(COCO(MetadataCatalog.get(name).json_file).getImgIds()) == [ids[2], ids[7]]

    cfg.DATASETS.TRAIN, cfg.DATASETS.OVERFIT_IMAGE_IDS = ("shapes_train",), (ids[-1] + 1,)
    with pytest.raises(ValueError, match=f"no image with id {ids[-1] + 1}"):
        setup_datasets(cfg)
    cfg.DATASETS.OVERFIT_IMAGES = 3
    with pytest.raises(ValueError, match="not both"):
        setup_datasets(cfg)
