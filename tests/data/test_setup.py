"""From the config to registered data sets: the user's, named ones, the embedded ones."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from pycocotools.coco import COCO

from solo_d2.config import add_solo_d2_config
from solo_d2.data import SHAPES, catalog, require_images, setup_datasets
from solo_d2.modeling.num_classes import dataset_num_classes

REPOSITORY = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.usefixtures("catalogs")


def one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


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
    # the working directory is searched first
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


def test_coco_mini_names_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no data set folder .*coco_mini. Set DETECTRON2"):
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


def test_named_subsets_are_those_of_their_set(data_dir, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(data_dir))
    assert len(MetadataCatalog.get("coco_mini_overfit8").thing_classes) == 80  # before it is loaded
    records = DatasetCatalog.get("coco_mini_overfit8")
    whole = [r for r in DatasetCatalog.get("coco_mini_train") if r["annotations"]]
    assert [r["image_id"] for r in records] == [r["image_id"] for r in whole[:8]]
    truth = COCO(MetadataCatalog.get("coco_mini_overfit8").json_file)
    assert sorted(truth.getImgIds()) == sorted(r["image_id"] for r in records)
    ids = [r["image_id"] for r in DatasetCatalog.get("nuclei_overfit4")]
    assert ids == [7, 9, 10, 13]


def test_a_file_with_other_classes_than_registered_is_refused(
    document, write, tmp_path, monkeypatch
):
    json_file, folder = write(document)
    (tmp_path / "nuclei" / "annotations").mkdir(parents=True)
    json_file.rename(tmp_path / "nuclei" / "annotations" / "instances_val.json")
    folder.rename(tmp_path / "nuclei" / "val")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    with pytest.raises(ValueError, match="'nuclei_val' has the classes .'nucleus'."):
        DatasetCatalog.get("nuclei_val")


@pytest.mark.parametrize("split", ["train", "val"])
def test_missing_images_of_ones_own_sets_are_found_at_once(cfg, document, write, split):
    sets = {"train": write(document, "train"), "val": write(document, "val")}
    (sets[split][1] / "b.png").unlink()
    set_custom(cfg, **sets)
    with pytest.raises(FileNotFoundError, match="1 of 2 images are missing: .*b.png"):
        setup_datasets(cfg)


def test_missing_images_of_other_test_sets_are_found_on_demand(cfg, tmp_path):
    records = [{"file_name": str(tmp_path / "gone.png"), "annotations": []}]
    DatasetCatalog.register("theirs", lambda: records)
    cfg.DATASETS.TEST = ("theirs",)
    setup_datasets(cfg)
    with pytest.raises(FileNotFoundError, match="theirs: 1 of 1 images are missing: .*gone.png"):
        require_images(cfg)


def test_a_training_set_of_crowds_says_so(cfg, document, write):
    for annotation in document["annotations"]:
        annotation["iscrowd"] = 1
    set_custom(cfg, train=write(document))
    with pytest.raises(ValueError, match="no object .*: crowd regions.*CROWD_IS_OBJECT.*: 3"):
        setup_datasets(cfg)
    cfg.DATASETS.CUSTOM.CROWD_IS_OBJECT = True
    setup_datasets(cfg)
    assert sum(len(r["annotations"]) for r in DatasetCatalog.get("mine_train")) == 3


def test_a_training_set_of_boxes_needs_a_box_detector(cfg, document, write):
    for annotation in document["annotations"]:
        annotation["segmentation"] = []
    set_custom(cfg, train=write(document))
    cfg.MODEL.MASK_ON = True
    with pytest.raises(ValueError, match="no object .*: annotations with no segm.*: 3.*MASK"):
        setup_datasets(cfg)
    cfg.MODEL.MASK_ON = False
    setup_datasets(cfg)
    assert sum(len(r["annotations"]) for r in DatasetCatalog.get("mine_train")) == 3


def test_rle_for_polygons_is_refused_before_the_training(cfg, document, write):
    set_custom(cfg, train=write(document))
    cfg.MODEL.MASK_ON = True
    with pytest.raises(ValueError, match='annotation 12 is an RLE; set INPUT.MASK_FORMAT to "bit'):
        setup_datasets(cfg)
    cfg.INPUT.MASK_FORMAT = "bitmask"
    setup_datasets(cfg)


def test_a_file_is_read_once_and_again_when_it_changed(cfg, document, write, monkeypatch):
    json_file, folder = write(document)
    set_custom(cfg, val=(json_file, folder))
    setup_datasets(cfg)
    with monkeypatch.context() as patch:
        patch.setattr(catalog, "read_coco", lambda *_, **__: pytest.fail("read again"))
        assert len(DatasetCatalog.get("mine_val")) == 2
    document["annotations"].pop()
    json_file.write_text(json.dumps(document))
    assert sum(len(r["annotations"]) for r in DatasetCatalog.get("mine_val")) == 2


# --- other people's data sets are not changed

IMPORT_AFTER_USER = """
from detectron2.data import DatasetCatalog, MetadataCatalog
theirs = {}
for name in ("shapes_train", "coco_mini_val", "nuclei_train"):
    theirs[name] = lambda name=name: [{"file_name": name}]
    DatasetCatalog.register(name, theirs[name])
    MetadataCatalog.get(name).thing_classes = ["mine"]
before = {k: dict(v.as_dict()) for k, v in MetadataCatalog.data.items()}
import solo_d2
from solo_d2.config import load_config
sets = {"TRAIN": "coco_2017_val_100", "TEST": "shapes_train"}
cfg = load_config(opts=[x for k, v in sets.items() for x in (f"DATASETS.{k}", f"('{v}',)")])
try:
    solo_d2.data.setup_datasets(cfg)
except ValueError as error:
    assert "must have the same classes" in str(error)
for name, load in theirs.items():
    assert DatasetCatalog.data[name] is load
for name, values in before.items():
    assert MetadataCatalog.get(name).as_dict() == values, name
print("unchanged")
"""


def test_importing_and_setting_up_change_nothing_of_others():
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_AFTER_USER], capture_output=True, text=True, check=False
    )
    assert done.stdout.endswith("unchanged\n"), done.stderr


def test_a_size_of_shapes_without_width_is_named(cfg):
    cfg.DATASETS.SHAPES.IMAGE_SIZE = (64,)
    with pytest.raises(ValueError, match=r"DATASETS\.SHAPES\.IMAGE_SIZE must be .*not \[64\]"):
        setup_datasets(cfg)


def test_shapes_of_a_user_stay(cfg):
    for name in ("shapes_train", "shapes_val"):
        DatasetCatalog.pop(name)
        DatasetCatalog.register(name, list)
    cfg.DATASETS.TRAIN = ("shapes_train",)
    setup_datasets(cfg)
    assert DatasetCatalog.get("shapes_train") == []
