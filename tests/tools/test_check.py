"""python -m solo_d2 check: each finding, the cells, the output."""

import json
from pathlib import Path

import cv2
import numpy as np
import pycocotools.mask as mask_util
import pytest
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog, build_detection_test_loader
from detectron2.data.datasets import register_coco_instances
from PIL import Image

from solo_d2.config import add_solo_d2_config
from solo_d2.data import coco as coco_module
from solo_d2.data import register_coco_json
from solo_d2.data.coco import REFUSED, REPAIRED, SKIPPED
from solo_d2.tools import check_report
from solo_d2.tools.check import check, find_sources, main
from solo_d2.tools.check_report import REMARK, summary, to_text

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIG = REPOSITORY / "configs" / "quick" / "solov2_shapes.yaml"
HEIGHT, WIDTH = 40, 60

# Detectron2 makes tensors of Pillow's read-only images.
pytestmark = pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")


@pytest.fixture(autouse=True)
def catalogs(tmp_path, monkeypatch):
    """A separate cache for the test; the catalogs are restored afterwards."""
    monkeypatch.setenv("SOLO_D2_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(
        coco_module, "_USUAL_CROWDS", 0.5
    )  # one of three annotations may be a crowd
    before = dict(DatasetCatalog.data), dict(MetadataCatalog.data)
    yield
    DatasetCatalog.data, MetadataCatalog.data = before


def rle(x1, y1, x2, y2, size=(HEIGHT, WIDTH)):
    mask = np.zeros(size, np.uint8, order="F")
    mask[y1:y2, x1:x2] = 1
    encoded = mask_util.encode(mask)
    return {"size": list(size), "counts": encoded["counts"].decode()}


def square(identity, x, y, side=10, *, image=1, category=1):
    return {
        "id": identity,
        "image_id": image,
        "category_id": category,
        "bbox": [x, y, side, side],
        "area": side * side,
        "iscrowd": 0,
        "segmentation": rle(x, y, x + side, y + side),
    }


@pytest.fixture
def document():
    """Two images with two objects and one."""
    names = ("a.png", "b.png")
    return {
        "images": [
            {"id": i + 1, "file_name": name, "height": HEIGHT, "width": WIDTH}
            for i, name in enumerate(names)
        ],
        "annotations": [
            square(11, 5, 5),
            square(12, 30, 20, category=2),
            square(13, 20, 5, image=2),
        ],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    }


@pytest.fixture
def write(tmp_path):
    """Writes a document and its images, with a color that differs from set to set."""

    def write(document, name="train", color=0):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        json_file = tmp_path / f"{name}.json"
        json_file.write_text(json.dumps(document))
        for image in document["images"]:
            if isinstance(image, dict) and isinstance(image.get("file_name"), str):
                path = folder / image["file_name"]
                Image.new("RGB", (WIDTH, HEIGHT), (color, 0, 0)).save(path)
        return json_file, folder

    return write


def config(train=None, val=None, *, architecture="SOLOv2"):
    cfg = get_cfg()
    add_solo_d2_config(cfg)
    cfg.merge_from_file(CONFIG)
    cfg.MODEL.META_ARCHITECTURE = architecture
    custom = cfg.DATASETS.CUSTOM
    if train:
        custom.TRAIN_JSON, custom.TRAIN_IMAGES = map(str, train)
    if val:
        custom.VAL_JSON, custom.VAL_IMAGES = map(str, val)
    return cfg


def findings(report):
    return report.findings


def check_one(files, **options):
    (report,) = check(config(files), **options)
    return report


def only_finding(report):
    ((key, offenders),) = findings(report).items()
    return (*key, offenders)


def test_good_data_gives_counts_and_no_finding(document, write):
    report = check_one(write(document), decode_images=True)
    assert findings(report) == {}
    assert (report.images, report.objects, report.crowds, report.most_objects) == (2, 3, 0, 2)
    assert report.classes == {"cat": (2, 2), "dog": (1, 1)}
    assert report.sizes["masks"]["median"] == 10
    # 40 x 60 becomes 128 x 192
    assert report.sizes["masks at test size"]["median"] == 32
    assert report.sizes["masks"]["small"] == 3
    assert report.sizes["masks at test size"]["medium"] == 3
    assert report.cells.objects == 3
    assert report.cells.without_cell == 0


def test_nothing_is_registered_or_written(document, write, tmp_path):
    del document["annotations"][0]["area"]
    check_one(write(document))
    assert "custom_train" not in DatasetCatalog.list()
    assert not (tmp_path / "cache").exists()


# --- images


def test_missing_images(document, write):
    files = write(document)
    (files[1] / "b.png").unlink()
    assert only_finding(check_one(files)) == (REFUSED, "missing images", ["b.png"])


def test_a_missing_folder_is_one_finding(document, tmp_path, write):
    json_file, _ = write(document)
    register_coco_instances("far_away", {}, str(json_file), str(tmp_path / "gone"))
    cfg = config()
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("far_away",), ()
    (report,) = check(cfg)
    assert only_finding(report) == (REFUSED, "missing image folder", [str(tmp_path / "gone")])


def test_files_that_are_no_images(document, write):
    files = write(document)
    (files[1] / "a.png").write_text("hello")
    expected = (REFUSED, "unreadable images", ["a.png (not an image)"])
    assert only_finding(check_one(files)) == expected


def test_truncated_images_are_found_by_decoding(document, write):
    files = write(document)
    noise = np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), np.uint8)
    Image.fromarray(noise).save(files[1] / "a.jpg")
    content = (files[1] / "a.jpg").read_bytes()
    (files[1] / "a.png").write_bytes(content[: len(content) // 2])
    assert findings(check_one(files)) == {}
    effect, what, (offender,) = only_finding(check_one(files, decode_images=True))
    assert (effect, what) == (REFUSED, "unreadable images")
    assert "a.png" in offender
    assert "truncated" in offender


def test_images_of_another_size(document, write):
    files = write(document)
    Image.new("RGB", (WIDTH, HEIGHT + 1)).save(files[1] / "a.png")
    effect, what, offenders = only_finding(check_one(files))
    assert (effect, what) == (REFUSED, "images with another size than in the json")
    assert offenders == ["a.png (60 x 40 in the json, 60 x 41 as read)"]


def save_rotated(path, size, orientation, **options):
    image = Image.new("RGB", size)
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(path, exif=exif, **options)


@pytest.mark.parametrize(("name", "format"), [("a.png", "JPEG"), ("a.png", "PNG")])
def test_images_that_exif_turns(document, write, name, format):
    files = write(document)
    save_rotated(files[1] / name, (HEIGHT, WIDTH), 6, format=format)
    effect, what, offenders = only_finding(check_one(files))
    assert (effect, offenders) == (REMARK, ["a.png"])
    assert "rotated by EXIF" in what
    # the json has the size of the file, Detectron2 reads a rotated image
    save_rotated(files[1] / name, (WIDTH, HEIGHT), 8, format=format)
    effect, what, offenders = only_finding(check_one(files))
    assert effect == REFUSED
    assert "before EXIF rotation" in what
    assert offenders == ["a.png (60 x 40 in the json, 40 x 60 as read)"]


def test_exif_of_an_upright_image_is_nothing(document, write):
    files = write(document)
    save_rotated(files[1] / "a.png", (WIDTH, HEIGHT), 1)
    assert findings(check_one(files)) == {}


def test_images_without_objects_and_crowds(document, write):
    document["annotations"][2]["iscrowd"] = 1
    report = check_one(write(document))
    assert only_finding(report) == (REMARK, "images without objects", ["b.png"])
    assert (report.objects, report.crowds) == (2, 1)


def test_the_same_image_twice(document, write):
    document["images"][1]["file_name"] = "a.png"
    expected = (REMARK, "images listed more than once", ["a.png"])
    assert only_finding(check_one(write(document))) == expected


# --- annotations


@pytest.mark.parametrize("key", ["area", "iscrowd", "bbox"])
def test_missing_keys_are_repaired(document, write, key):
    del document["annotations"][1][key]
    effect, what, offenders = only_finding(check_one(write(document)))
    assert (effect, offenders) == (REPAIRED, ["annotation 12 of image 1"])
    assert "missing" in what


@pytest.mark.parametrize(
    ("change", "effect", "what"),
    [
        ({"category_id": 7}, REFUSED, "annotations of unknown categories"),
        ({"image_id": 7}, REFUSED, "annotations of unknown images"),
        (
            {"ignore": 1},
            REFUSED,
            'annotations with "ignore", unknown to COCO metrics (use "iscrowd": 1)',
        ),
        (
            {"segmentation": "x"},
            REFUSED,
            "annotations whose segmentation is neither polygons nor an RLE",
        ),
        (
            {"segmentation": rle(0, 0, 5, 5, (9, 9))},
            REFUSED,
            "masks (RLE) with another size than their image",
        ),
        (
            {"segmentation": {"size": [HEIGHT, WIDTH], "counts": [5, 5]}},
            REFUSED,
            "masks (RLE) whose runs (counts) do not add up to the image",
        ),
        (
            {"segmentation": rle(5, 5, 15, 15) | {"counts": rle(5, 5, 15, 15)["counts"][:-4]}},
            REFUSED,
            "masks (RLE) whose runs (counts) do not add up to the image",
        ),
        (
            {"segmentation": [[5, 5, 15, 5, float("nan"), 15]]},
            REFUSED,
            "polygons whose coordinates are not numbers of pixels",
        ),
        (
            {"segmentation": [[5, 5, 15, 5, 1e12, 15]]},
            REFUSED,
            "polygons whose coordinates are not numbers of pixels",
        ),
        ({"segmentation": [[5, 5, 15, 5]]}, SKIPPED, "annotations with a degenerate polygon"),
        ({"segmentation": []}, SKIPPED, "annotations with no segmentation"),
        ({"segmentation": rle(0, 0, 0, 0)}, SKIPPED, "annotations with an empty mask"),
        (
            {"segmentation": [[-30, 5, -20, 5, -20, 15]]},
            SKIPPED,
            "annotations with polygons that cover no pixel",
        ),
    ],
)
def test_annotations_that_training_does_not_use(document, write, change, effect, what):
    document["annotations"][0].update(change)
    report = check_one(write(document))
    ((key, (offender,)),) = findings(report).items()
    assert key == (effect, what)
    assert "annotation 11" in offender
    assert report.objects == 2


@pytest.mark.parametrize(
    ("change", "effect", "what"),
    [
        (
            {"segmentation": [[5, 5, 15, 5, 15, 15, 5, 15], [1, 1, 2, 2]]},
            REPAIRED,
            "masks with a degenerate polygon, which is removed",
        ),
        (
            {"segmentation": [[-9, 5, 15, 5, 15, 15, -9, 15]], "bbox": [0, 5, 15, 10]},
            REMARK,
            "polygons that extend beyond the image",
        ),
        (
            {"bbox": [5, 5, 15, 15], "segmentation": rle(5, 5, 15, 15)},
            REPAIRED,
            "boxes unlike their masks (corners or fractions?), taken from the masks",
        ),
        (
            {"id": 0},
            REPAIRED,
            "annotation ids missing, repeated or not positive, all renumbered",
        ),
    ],
)
def test_annotations_that_are_odd(document, write, change, effect, what):
    document["annotations"][0].update(change)
    report = check_one(write(document))
    *found, offenders = only_finding(report)
    assert found == [effect, what]
    assert len(offenders) == 1
    assert report.objects == 3


def test_brush_crowds_are_skipped_with_the_setting_that_helps(document, write, monkeypatch):
    for annotation in document["annotations"]:
        annotation["iscrowd"] = 1
    report = check_one(write(document))
    ((_, what), offenders), *_ = findings(report).items()
    assert len(offenders) == 3 and "CROWD_IS_OBJECT" in what
    assert (REFUSED, "training data without objects") in findings(report)
    cfg = config(write(document))
    cfg.DATASETS.CUSTOM.CROWD_IS_OBJECT = True
    (report,) = check(cfg)
    assert report.objects == 3 and {effect for effect, _ in findings(report)} == {REPAIRED}


def test_boxes_are_enough_for_a_detector_without_masks(document, write):
    for annotation in document["annotations"]:
        annotation["segmentation"] = []
    cfg = config(write(document), architecture="GeneralizedRCNN")
    cfg.MODEL.MASK_ON = False
    (report,) = check(cfg)
    assert findings(report) == {} and report.objects == 3
    assert report.sizes["masks"]["median"] == 10


def test_images_of_more_than_8_bits(document, write):
    files = write(document)
    deep = np.full((HEIGHT, WIDTH), 500, np.uint16)
    Image.fromarray(deep).save(files[1] / "a.png")
    effect, what, offenders = only_finding(check_one(files))
    assert (effect, offenders) == (REPAIRED, ["a.png"]) and "divided by 257" in what
    color = np.full((HEIGHT, WIDTH, 3), 0.5, np.float32)  # which Pillow cannot read
    (files[1] / "a.png").write_bytes(cv2.imencode(".tif", color)[1])
    assert only_finding(check_one(files)) == (REPAIRED, what, ["a.png"])
    Image.fromarray(deep.astype(np.float32)).save(files[1] / "a.png", format="TIFF")
    effect, what, (offender,) = only_finding(check_one(files))
    assert (effect, what) == (REFUSED, "unreadable images") and "500 to 500" in offender


def test_file_names_that_leave_the_folder(document, write):
    files = write(document)
    Image.new("RGB", (WIDTH, HEIGHT)).save(files[1].parent / "c.png")
    document["images"][0]["file_name"] = "../c.png"
    files[0].write_text(json.dumps(document))
    expected = (REMARK, "file names that lead out of the image folder", ["../c.png"])
    assert only_finding(check_one(files)) == expected


def test_polygons_may_reach_a_little_out_of_the_image(document, write):
    polygon = [50, 5, WIDTH + 1, 5, WIDTH + 1, 15, 50, 15]
    document["annotations"][0].update(segmentation=[polygon], bbox=[50, 5, 10, 10])
    assert findings(check_one(write(document))) == {}


def test_an_annotation_that_is_there_twice(document, write):
    document["annotations"].append(document["annotations"][0] | {"id": 14})
    effect, what, offenders = only_finding(check_one(write(document)))
    assert effect == REMARK
    assert what == "annotations with image, category and mask of an earlier one"
    assert offenders == ["annotation 14 (a.png)"]


def test_rle_needs_bitmasks_in_training_only(document, write):
    cfg = config(write(document), write(document, "val", color=9))
    cfg.INPUT.MASK_FORMAT = "polygon"
    document["annotations"][0]["iscrowd"] = 1
    cfg.DATASETS.CUSTOM.TRAIN_JSON = str(write(document)[0])
    train, val = check(cfg)
    effect, what, offenders = only_finding(train)
    assert effect == REFUSED
    assert 'INPUT.MASK_FORMAT "polygon"; set it to "bitmask"' in what
    assert offenders == ["annotation 12 (a.png)", "annotation 13 (b.png)"]
    assert findings(val) == {}


# --- the file


@pytest.mark.parametrize("text", ["", "hello", "[]", '{"images": []}'])
def test_other_files_than_coco(write, document, text):
    json_file, folder = write(document)
    json_file.write_text(text)
    report = check_one((json_file, folder))
    (effect, what), offenders = next(iter(report.findings.items()))
    assert (effect, what) == (REFUSED, "file that is not a COCO json")
    assert str(json_file) in offenders[0]


@pytest.mark.parametrize("section", ["images", "categories"])
def test_ids_used_twice(document, write, section):
    document[section].append(dict(document[section][-1]))
    report = check_one(write(document))
    identity = document[section][-1]["id"]
    offenders = [f"id {identity}"]
    assert findings(report) == {(REFUSED, f"{section} with the same id as another one"): offenders}
    assert report.objects == 3


def test_entries_that_lack_something(document, write):
    document["images"].append({"id": 3, "file_name": "c.png"})
    document["annotations"].append({"id": 15})
    document["annotations"].append("hello")
    document["categories"].append({"id": 3})
    found = findings(check_one(write(document)))
    assert found[REFUSED, "images without 'height'"] == ["images[2]"]
    offenders = ["annotations[3]", "annotations[4]"]
    assert found[REFUSED, "annotations without 'image_id'"] == offenders
    assert found[REFUSED, "categories without 'name'"] == ["categories[2]"]
    assert len(found) == 3


def test_ids_and_sizes_of_other_types(document, write):
    document["images"].append({"id": [3], "file_name": "c.png", "height": 9, "width": 9})
    document["images"].append({"id": 4, "file_name": "d.png", "height": 0, "width": 9})
    document["images"].append({"id": 5, "file_name": "e.png", "height": str(HEIGHT), "width": 60.0})
    found = findings(check_one(write(document)))
    assert found[REFUSED, "images whose id is neither a number nor a text"] == [
        "images[2] (id [3])"
    ]
    assert found[REFUSED, "images whose file name or size is invalid"] == [
        "image 4 (file_name 'd.png', height 0, width 9)",
    ]
    assert found[REPAIRED, "image sizes that are not integers, converted"] == ["e.png"]


def test_all_problems_are_reported_at_once(document, write):
    """Registering the same file stops at the first problem."""
    document["annotations"][0]["category_id"] = 5
    document["annotations"][1]["image_id"] = 70
    document["annotations"][2]["segmentation"] = []
    files = write(document)
    with pytest.raises(ValueError, match="category_id 5"):
        register_coco_json("custom", *files)
    effects = [effect for effect, _ in check_one(files).findings]
    assert effects.count(REFUSED) == 3  # no object is left
    assert effects.count(SKIPPED) == 1


def test_no_images_at_all(document, write):
    document["images"], document["annotations"] = [], []
    report = check_one(write(document))
    found = findings(report)
    assert (REFUSED, "data set without images") in found
    assert (REFUSED, "training data without objects") in found
    assert "0 images" in to_text(report, config())


def test_classes_without_objects(document, write):
    document["categories"].append({"id": 3, "name": "horse"})
    report = check_one(write(document))
    assert only_finding(report) == (REMARK, "classes without objects", ["horse"])
    assert report.classes["horse"] == (0, 0)


# --- several sets


def test_images_in_both_sets_by_name_and_content(document, write):
    train = write(document)
    reports = check(config(train, write(document, "val", color=9)))
    assert [findings(report) for report in reports] == [{}, {}]
    (train[1] / "a.png").write_bytes((train[1].parent / "val" / "a.png").read_bytes())
    reports = check(config(train, (train[0].parent / "val.json", train[0].parent / "val")))
    assert findings(reports[0]) == {}
    expected = (REMARK, "images that are in custom_train too, by name and content", ["a.png"])
    assert only_finding(reports[1]) == expected


def test_sets_of_different_classes(document, write):
    train = write(document)
    document["categories"][1]["name"] = "horse"
    reports = check(config(train, write(document, "val", color=9)))
    effect, what, (offender,) = only_finding(reports[1])
    assert (effect, what) == (REFUSED, "data sets with other classes")
    assert "class 1 is 'dog' in one and 'horse' in the other" in offender


def test_a_set_for_training_and_evaluation_is_checked_once(document, write):
    register_coco_json("mine", *write(document))
    cfg = config()
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ("mine",)
    (report,) = check(cfg)
    assert report.keys == ["DATASETS.TRAIN", "DATASETS.TEST"]
    expected = (REMARK, "data sets that are trained on and evaluated on", ["mine"])
    assert only_finding(report) == expected


def test_the_ids_of_a_registered_set_are_its_own(document, write):
    json_file, folder = write(document)
    register_coco_json("mine", json_file, folder)
    document["categories"].append({"id": 3, "name": "horse"})
    document["annotations"][0]["category_id"] = 3
    write(document)
    cfg = config()
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("mine",), ()
    (effect, what), _ = list(check(cfg)[0].findings.items())[0]
    assert (effect, what) == (REFUSED, "file with other classes than the registered data set")


def test_the_embedded_set_is_drawn_and_clean():
    cfg = config()
    cfg.DATASETS.SHAPES.TRAIN_IMAGES = cfg.DATASETS.SHAPES.VAL_IMAGES = 8
    reports = check(cfg, decode_images=True)
    assert [report.name for report in reports] == ["shapes_train", "shapes_val"]
    assert [report.images for report in reports] == [8, 8]
    assert all(effect == REMARK for report in reports for effect, _ in report.findings)
    assert all(report.cells.objects == report.objects > 0 for report in reports)


def test_find_sources_agrees_with_the_loader(document, write):
    """The checked data sets are those that Detectron2 loads."""
    register_coco_json("mine", *write(document))
    cfg = config()
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (), ("mine",)
    (source,) = find_sources(cfg)
    (report,) = check(cfg)
    loaded = build_detection_test_loader(cfg, source.name).dataset
    assert len(loaded) == report.images


# --- cells


@pytest.fixture
def crowded(document):
    """Ten objects of 4 x 4 pixels, side by side in pairs."""
    document["annotations"] = [
        square(1 + 2 * i + j, 2 + 12 * i + 4 * j, 18, side=4) for i in range(5) for j in range(2)
    ]
    document["images"] = document["images"][:1]
    document["categories"] = document["categories"][:1]
    return document


def test_objects_that_lose_their_cell(crowded, write):
    cfg = config(write(crowded))
    cfg.merge_from_list(["MODEL.SOLO.NUM_GRIDS", "[8, 8, 8]", "MODEL.SOLO.CENTER_SIGMA", "0.0"])
    (report,) = check(cfg)
    # 60 pixels in 8 columns of 7.5: of the centers 4, 8; 16, 20; 28, 32; 40, 44; 52, 56
    # the second and fourth pair have a column in common
    assert report.cells.levels[0] == [10, 2]
    assert report.cells.lost == report.cells.without_cell == 2
    assert summary([report]).endswith("; 2 objects without a grid cell")
    assert "  2 lose all of theirs to objects that come later" in to_text(report, cfg)


def test_only_the_family_has_cells(document, write):
    (report,) = check(config(write(document), architecture="GeneralizedRCNN"))
    assert report.cells is None
    assert "SCALE_RANGES" not in to_text(report, config())
    assert report.sizes["masks at test size"]["median"] == 32


def test_levels_that_do_not_match(document, write, capsys):
    data = [str(x) for x in (*write(document), *write(document, "val"))]
    arguments = ["--config-file", str(CONFIG), "--data", *data, "MODEL.SOLO.NUM_GRIDS", "[8]"]
    assert main(arguments) == 2
    assert "NUM_GRIDS: 1, SCALE_RANGES: 3" in capsys.readouterr().err


# --- the command


def run(document, write, *options, val=None):
    train = write(document)
    val = write(val or document, "val", color=9)
    data = [str(x) for x in (*train, *val)]
    return main(["--config-file", str(CONFIG), "--data", *data, *options])


def test_clean_data_exits_with_0(document, write, capsys):
    assert run(document, write, "INPUT.MIN_SIZE_TEST", "80") == 0
    out = capsys.readouterr().out
    assert "custom_train (DATASETS.TRAIN)" in out
    assert "custom_val (DATASETS.TEST)" in out
    assert "No problems." in out
    assert "shorter side 80, longer at most 1333" in out
    assert out.endswith("2 data sets checked: no problems\n")


def test_repairs_exit_with_0(document, write, capsys):
    del document["annotations"][0]["area"]
    assert run(document, write) == 0
    assert "0 refused, 0 skipped, 2 repaired, 0 remarks" in capsys.readouterr().out


def test_problems_exit_with_1_and_the_first_are_named(document, write, capsys, monkeypatch):
    monkeypatch.setattr(check_report, "_EXAMPLES", 2)
    for annotation in document["annotations"]:
        annotation["segmentation"] = []
    assert run(document, write) == 1
    out = capsys.readouterr().out
    assert "annotation 11 of image 1, annotation 12 of image 1, ..." in out
    assert "6 skipped" in out


def test_everything_is_in_the_json(document, write, tmp_path):
    document["annotations"][0]["category_id"] = 5
    assert run(document, write, "--json", str(tmp_path / "out.json")) == 1
    content = json.loads((tmp_path / "out.json").read_text())
    train, val = content["data_sets"]
    assert "2 refused" in content["summary"]
    assert (train["name"], val["name"]) == ("custom_train", "custom_val")
    (finding,) = [f for f in train["findings"] if f["effect"] == REFUSED]
    assert finding["offenders"] == ["annotation 11 of image 1 (category_id 5)"]
    assert train["cells"]["objects"] == 2
    assert train["cells"]["levels"][0][0] >= 0
    assert train["classes"] == {"cat": [1, 1], "dog": [1, 1]}


def test_options_and_overrides_may_be_mixed(document, write, tmp_path):
    options = ("INPUT.MIN_SIZE_TEST", "80", "--images", "--json", str(tmp_path / "out.json"))
    assert run(document, write, *options) == 0
    assert (tmp_path / "out.json").exists()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--config-file", "gone.yaml"], "no config file gone.yaml"),
        (["--config-file", str(CONFIG), "MODEL.SOLO.GRIDS", "3"], "MODEL.SOLO.GRIDS"),
        (["--config-file", str(CONFIG), "DATASETS.TRAIN", "('gone',)"], "no data set 'gone'"),
        (
            ["--config-file", str(CONFIG), "--data", "a", "b", "c", "d"],
            "DATASETS.CUSTOM.TRAIN_JSON: there is no a",
        ),
        (
            ["--config-file", str(CONFIG), "DATASETS.TRAIN", "()", "DATASETS.TEST", "()"],
            "names no data set",
        ),
        (["--config-file", str(CONFIG), "--json", "gone/out.json"], "there is no folder gone"),
    ],
)
def test_wrong_usage_is_one_line_and_exits_with_2(arguments, complaint, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert complaint in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_many_classes_stand_side_by_side(document, write):
    document["categories"] = [{"id": i, "name": f"class{i}"} for i in range(1, 31)]
    report = check_one(write(document))
    text = to_text(report, config())
    lines = [line for line in text.splitlines() if "class1 " in line]
    assert "class11" in lines[0]
    assert all(f"class{i}" in text for i in range(1, 31))


# --- real data


@pytest.mark.parametrize(
    ("name", "config_file", "images", "objects"),
    [
        ("pennfudan", "pennfudan/solov2_mobilenetv2.yaml", [130, 40], [327, 96]),
        ("coco_mini", "coco_mini/solov2_mobilenetv2_overfit8.yaml", [129, 132], [1182, 1096]),
    ],
)
def test_real_data_has_no_problems(data_dir, monkeypatch, name, config_file, images, objects):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(data_dir))

    cfg = get_cfg()
    add_solo_d2_config(cfg)
    cfg.merge_from_file(str(REPOSITORY / "configs" / config_file))
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (f"{name}_train",), (f"{name}_val",)
    reports = check(cfg)
    assert [report.images for report in reports] == images
    assert [report.objects for report in reports] == objects
    assert all(effect == REMARK for report in reports for effect, _ in report.findings)
