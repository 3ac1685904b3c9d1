"""The reader of users' COCO json files: what it repairs, skips and refuses."""

import copy
import json
import logging
from pathlib import Path

import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import BitMasks, Boxes, Instances

from solo_d2.data import coco as coco_module
from solo_d2.data import register_coco_json
from solo_d2.data.annotations import to_rle
from solo_d2.data.coco import SKIPPED, read_coco

HEIGHT, WIDTH = 40, 60

pytestmark = pytest.mark.usefixtures("catalogs")


@pytest.fixture(autouse=True)
def usual_crowds(monkeypatch):
    """One of the three annotations of the document is a crowd."""
    monkeypatch.setattr(coco_module, "_USUAL_CROWDS", 0.5)


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
    assert metadata.json_file == str(json_file)  # nothing to repair: the evaluator reads the file
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
    assert len(mapper(records[1])["instances"]) == 0  # only a crowd


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


# --- entries that are skipped or repaired, in training and in evaluation


@pytest.mark.parametrize("key", ["iscrowd", "area", "bbox"])
def test_missing_keys_are_completed_for_the_evaluator_too(document, write, key, caplog):
    expected = copy.deepcopy(document)
    del document["annotations"][0][key]
    del document["annotations"][1][key]
    with caplog.at_level(logging.WARNING):
        records, metadata = load(document, write)
    (warning,) = caplog.messages
    noun = {"iscrowd": "iscrowd", "area": "areas", "bbox": "boxes"}[key]
    assert f"repaired {noun} missing, taken " in warning and ": 2." in warning
    assert metadata.json_file != str(write(document)[0])
    assert metadata.json_file in warning
    assert evaluator_annotations("custom") == expected["annotations"]
    assert records[0]["annotations"][0]["bbox"] == [2, 3, 10, 20]
    assert records[0]["annotations"][0]["iscrowd"] == 0


def rle(counts):
    return {"size": [HEIGHT, WIDTH], "counts": counts}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"segmentation": [[1, 1, 5, 5]]}, "with a degenerate polygon"),
        ({"segmentation": [[1, 1, 5, 5, 1, 5, 2]]}, "with a degenerate polygon"),
        ({"segmentation": [[]]}, "with a degenerate polygon"),
        ({"segmentation": [[1, 1, 1, 1, 1, 1]]}, "with polygons that cover no pixel"),
        ({"segmentation": []}, "with no segmentation"),
        ({"segmentation": None}, "with no segmentation"),
        ({"segmentation": rle([HEIGHT * WIDTH])}, "with an empty mask"),
    ],
)
def test_annotations_without_a_mask_are_skipped(document, write, change, reason, caplog):
    document["annotations"][0].update(change)
    with caplog.at_level(logging.WARNING):
        records, _ = load(document, write)
    (warning,) = caplog.messages
    assert str(write(document)[0]) in warning
    assert f"skipped annotations {reason}: 1." in warning
    assert [len(r["annotations"]) for r in records] == [1, 1]
    assert [a["id"] for a in evaluator_annotations("custom")] == [12, 13]


SQUARE = [[2.0, 3.0, 12.0, 3.0, 12.0, 23.0, 2.0, 23.0]]
RUNS = [2 * HEIGHT + 3, 20, *[20, 20] * 9, 37 + 48 * HEIGHT - 20]


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"bbox": [5, 5, 0, 4]}, "boxes that are no"),
        ({"bbox": [5, 5, 4, -1]}, "boxes that are no"),
        ({"bbox": [5, 5, float("nan"), 4]}, "boxes that are no"),
        ({"bbox": [WIDTH, 5, 4, 4]}, "boxes that are no"),
        ({"bbox": [-4, 5, 4, 4]}, "boxes that are no"),
        ({"bbox": [1, 2, 3]}, "boxes that are no"),
        ({"bbox": "large"}, "boxes that are no"),
        ({"bbox": [2 / WIDTH, 3 / HEIGHT, 10 / WIDTH, 20 / HEIGHT]}, "boxes unlike their masks"),
        ({"bbox": [2, 13, 12, 33]}, "boxes unlike their masks"),
        ({"bbox": ["2", 3, "10", 20]}, "boxes whose numbers are texts"),
        ({"area": -7}, "areas that are not a number of pixels"),
        ({"area": 1e300}, "areas that are not a number of pixels"),
        ({"area": "many"}, "areas that are not a number of pixels"),
        ({"area": "200"}, "areas that are texts"),
        ({"iscrowd": "0"}, "iscrowd not 0 or 1"),
        ({"iscrowd": "false"}, "iscrowd not 0 or 1"),
        ({"iscrowd": False}, "iscrowd not 0 or 1"),
        ({"iscrowd": -1}, "iscrowd not 0 or 1"),
        ({"segmentation": SQUARE[0]}, "polygons without an enclosing list"),
        (
            {"segmentation": [[[2, 3], [12, 3], [12, 23], [2, 23]]]},
            "points are pairs",
        ),
        ({"segmentation": [[2, 3], [12, 3], [12, 23], [2, 23]]}, "points are pairs"),
        ({"segmentation": [[str(x) for x in SQUARE[0]]]}, "coordinates are texts"),
        ({"segmentation": [*SQUARE, [1, 1, 2, 2]]}, "masks with a degenerate polygon"),
        ({"segmentation": rle([str(x) for x in RUNS])}, "masks (RLE) whose numbers"),
        ({"image_id": "7"}, "refer to ids of another type"),
        ({"category_id": 9.0}, "refer to ids of another type"),
        ({"id": None}, "annotation ids missing"),
        ({"id": 12}, "annotation ids missing, repeated"),
        ({"id": 0}, "annotation ids missing, repeated or not positive"),
        ({"id": "x"}, "annotation ids missing, repeated or not positive"),
    ],
)
def test_what_has_a_single_meaning_is_repaired(document, write, change, what, caplog):
    """The first annotation is always read as the rectangle [2, 3, 10, 20]."""
    document["annotations"][0].update(change)
    with caplog.at_level(logging.WARNING):
        records, metadata = load(document, write)
    (warning,) = caplog.messages
    assert warning.count("repaired") == 1 and what in warning
    annotations = records[0]["annotations"]
    assert len(annotations) == 2
    assert annotations[0]["bbox"] == [2, 3, 10, 20]
    assert (annotations[0]["iscrowd"], annotations[0]["category_id"]) == (0, 1)
    mask = mask_util.decode(to_rle(annotations[0]["segmentation"], HEIGHT, WIDTH))
    assert mask.sum() == mask[3:23, 2:12].sum() == 200
    truth = evaluator_annotations("custom")
    assert truth[0]["area"] == 200
    assert len({a["id"] for a in truth}) == 3
    # the evaluator's file needs no repair
    again = read_coco(metadata.json_file, metadata.image_root)
    assert again.findings == {} and not again.changed


def test_ids_that_are_texts_are_numbered(document, write):
    for image in document["images"]:
        image["id"] = f"im{image['id']}"
    for annotation in document["annotations"]:
        annotation["image_id"] = f"im{annotation['image_id']}"
        annotation["category_id"] = {9: "cat", 4: "dog"}[annotation["category_id"]]
    for category in document["categories"]:
        category["id"] = category["name"]
    records, metadata = load(document, write)
    assert [r["image_id"] for r in records] == [1, 2]
    assert metadata.thing_classes == ["cat", "dog"]  # in the order of the file
    assert [[a["category_id"] for a in r["annotations"]] for r in records] == [[0, 1], [1]]
    assert COCOEvaluator("custom")._coco_api.getImgIds() == [1, 2]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_other_encodings_are_converted(document, write, encoding):
    json_file, folder = write(document)
    json_file.write_text(json.dumps(document), encoding=encoding)
    register_coco_json("custom", json_file, folder)
    metadata = MetadataCatalog.get("custom")
    assert json.loads(Path(metadata.json_file).read_text("utf-8")) == document
    assert len(evaluator_annotations("custom")) == 3


def test_images_and_categories_are_repaired(document, write):
    json_file, folder = write(document)
    (folder / "sub").mkdir()
    (folder / "b.png").rename(folder / "sub" / "b.png")
    document["images"][0] |= {"file_name": "sub\\b.png", "height": "40", "width": 60.0}
    document["categories"][0]["name"] = 17
    json_file.write_text(json.dumps(document))
    register_coco_json("custom", json_file, folder)
    records = DatasetCatalog.get("custom")
    assert records[0]["file_name"] == str(folder / "sub" / "b.png")
    assert (records[0]["height"], records[0]["width"]) == (40, 60)
    assert MetadataCatalog.get("custom").thing_classes == ["dog", "17"]


def test_categories_of_one_name_are_told_apart(document, write):
    document["categories"][1]["name"] = "cat"
    _, metadata = load(document, write)
    assert metadata.thing_classes == ["cat (4)", "cat"]
    json_file, folder = metadata.json_file, metadata.image_root
    assert read_coco(json_file, folder).classes == metadata.thing_classes


def test_many_crowds_are_named_with_the_setting_that_makes_them_objects(
    document, write, monkeypatch, caplog
):
    monkeypatch.undo()  # the usual share
    with caplog.at_level(logging.WARNING):
        load(document, write)
    assert "skipped crowd regions" in caplog.text and "CROWD_IS_OBJECT" in caplog.text
    coco = read_coco(*write(document), crowd_is_object=True)
    assert coco.objects == 3
    assert [a["iscrowd"] for a in coco.document["annotations"]] == [0, 0, 0]


def test_boxes_are_enough_where_no_masks_are_needed(document, write):
    del document["annotations"][0]["segmentation"]
    document["annotations"][1] |= {"segmentation": [], "bbox": [50, 30, 20, 20], "area": None}
    json_file, folder = write(document)
    register_coco_json("custom", json_file, folder, masks=False)
    annotations = DatasetCatalog.get("custom")[0]["annotations"]
    assert [a["bbox"] for a in annotations] == [[2, 3, 10, 20], [50, 30, 10, 10]]
    assert all("segmentation" not in a for a in annotations)
    assert [a["area"] for a in evaluator_annotations("custom")] == [200, 100, 40]
    document["annotations"][0]["bbox"] = [5, 5, 0, 4]
    assert "no mask" in read_coco(*write(document), masks=False).counts(SKIPPED)


def test_one_warning_counts_everything(document, write, caplog):
    document["annotations"][0]["segmentation"] = [[1, 1, 5, 5]]
    document["annotations"][1]["segmentation"] = [[1, 1, 5, 5]]
    del document["annotations"][2]["segmentation"]
    with caplog.at_level(logging.WARNING):
        records, _ = load(document, write)
    (warning,) = caplog.messages
    assert "skipped annotations with a degenerate polygon: 2; annotations with no seg" in warning
    assert [len(r["annotations"]) for r in records] == [0, 0]


def test_an_annotation_with_id_zero_counts_in_the_evaluation(document, write, caplog):
    """pycocotools treats a match with a ground truth of id 0 as no match."""
    document["annotations"] = document["annotations"][:1]
    document["annotations"][0]["id"] = 0
    with caplog.at_level(logging.WARNING):
        records, metadata = load(document, write)
    assert "all renumbered" in caplog.text
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
    copies = list((tmp_path / "cache" / "annotations").iterdir())
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
    assert "unknown categories: annotation 12 of image 7 (category_id 5)" in message


def test_an_unknown_image_is_named(document, write):
    document["annotations"][1]["image_id"] = 70
    assert "unknown images: annotation 12 of image 70" in annotation_error(document, write)


@pytest.mark.parametrize("section", ["images", "categories"])
def test_an_id_used_twice_is_named(document, write, section):
    document[section][1]["id"] = document[section][0]["id"]
    identity = document[section][0]["id"]
    assert f"{section} with the same id as another one: id {identity}" in annotation_error(
        document, write
    )


@pytest.mark.parametrize(
    ("section", "key"),
    [("images", "height"), ("images", "file_name"), ("annotations", "image_id")]
    + [("annotations", "category_id"), ("categories", "name"), ("images", "id")],
)
def test_a_missing_key_is_named(document, write, section, key):
    json_file, folder = write(document)
    del document[section][1][key]
    json_file.write_text(json.dumps(document))
    with pytest.raises(ValueError) as error:
        register_coco_json("custom", json_file, folder)
    assert one_line(error) == f"{json_file}: {section} without {key!r}: {section}[1]"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"segmentation": "[[1, 1, 9, 1, 9, 9]]"}, "neither polygons nor an RLE"),
        ({"segmentation": [{"x": 1}]}, "neither polygons nor an RLE"),
        ({"segmentation": [[1, 1, 9, 1, 9, None]]}, "coordinate None"),
        ({"segmentation": [[1, 1, 9, 1, 9, "x"]]}, "coordinate 'x'"),
        ({"segmentation": [[1, 1, 9, 1, 9, float("inf")]]}, "coordinate inf"),
        ({"segmentation": [[1, 1, 9, 1, 9, 10**400]]}, "coordinate 1000"),
        ({"segmentation": {"size": [9, 9], "counts": [0, 81]}}, "size [9, 9], image [40, 60]"),
        ({"segmentation": {"size": [HEIGHT, WIDTH], "counts": [3, 4]}}, "do not add up"),
        ({"segmentation": {"size": [HEIGHT, WIDTH]}}, "neither polygons nor an RLE"),
        ({"segmentation": {"size": [HEIGHT, WIDTH], "counts": "Q=0"}}, "do not add up"),
        ({"segmentation": {"size": [HEIGHT, WIDTH], "counts": "é"}}, "do not add up"),
        ({"iscrowd": 2}, "neither 0 nor 1: annotation 12 of image 7 (2)"),
        ({"iscrowd": "maybe"}, "neither 0 nor 1: annotation 12 of image 7 ('maybe')"),
        ({"ignore": 1}, '"iscrowd": 1'),
    ],
)
def test_a_malformed_annotation_is_named(document, write, change, complaint):
    document["annotations"][1].update(change)
    message = annotation_error(document, write)
    assert "annotation 12 of image 7" in message
    assert complaint in message


@pytest.mark.parametrize(
    ("section", "change", "complaint"),
    [
        ("images", {"id": [3]}, "neither a number nor a text: images[0] (id [3])"),
        ("images", {"id": 1.5}, "images[0] (id 1.5)"),
        ("images", {"id": True}, "images[0] (id True)"),
        ("images", {"height": 0}, "image 7 (file_name 'b.png', height 0, width 60)"),
        ("images", {"height": 10**9, "width": 10**9}, "whose file name or size is invalid"),
        ("images", {"width": "wide"}, "width 'wide'"),
        ("images", {"file_name": 3}, "file_name 3"),
        ("images", {"file_name": "a\0.png"}, "file_name 'a\\x00.png'"),
        ("categories", {"name": ["cat"]}, "is not a text: category 9 (name ['cat'])"),
    ],
)
def test_an_image_or_category_without_a_meaning_is_named(
    document, write, section, change, complaint
):
    json_file, folder = write(document)
    document[section][0].update(change)
    json_file.write_text(json.dumps(document))
    with pytest.raises(ValueError) as error:
        register_coco_json("custom", json_file, folder)
    assert complaint in one_line(error)
    assert "custom" not in DatasetCatalog


def test_deep_nesting_is_one_line(write, document):
    json_file, folder = write(document)
    json_file.write_text("[" * 100_000)
    with pytest.raises(ValueError, match="nested too deeply") as error:
        register_coco_json("custom", json_file, folder)
    one_line(error)


def test_a_name_that_somebody_else_registered_is_refused(document, write):
    DatasetCatalog.register("theirs", list)
    with pytest.raises(ValueError, match="'theirs' is registered already"):
        register_coco_json("theirs", *write(document))
    assert DatasetCatalog.get("theirs") == []


def test_a_file_without_categories_is_refused(document, write):
    document["categories"], document["annotations"] = [], []
    assert "no categories" in annotation_error(document, write)
