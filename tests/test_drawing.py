"""Drawing: colors, places, and unusual sizes."""

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.structures import Boxes, BoxMode, Instances
from PIL import Image

from solo_d2.drawing import comparison_grid, draw_instances

NAMES = ["disc", "bar"]


def gray(height, width):
    return np.full((height, width, 3), 128, dtype=np.uint8)


def predict(height, width, boxes, *, scores=None, classes=None):
    """Instances whose masks fill their boxes (x1, y1, x2, y2)."""
    masks = torch.zeros(len(boxes), height, width, dtype=torch.bool)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes, strict=True):
        mask[y1:y2, x1:x2] = True
    return Instances(
        (height, width),
        pred_masks=masks,
        pred_boxes=Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)),
        scores=torch.tensor(scores or [0.9] * len(boxes)),
        pred_classes=torch.tensor(classes or [0] * len(boxes), dtype=torch.int64),
    )


def record(folder, height, width, annotations=None, name="a picture.png"):
    Image.fromarray(gray(height, width)).save(folder / name)
    result = {"file_name": str(folder / name), "height": height, "width": width, "image_id": 1}
    return result if annotations is None else {**result, "annotations": annotations}


def test_draws_inside_the_mask_and_leaves_the_rest():
    image = gray(120, 160)
    drawn = draw_instances(
        image, predict(120, 160, [(80, 70, 140, 110)]), NAMES, score_threshold=0.5
    )
    assert drawn.shape == image.shape and drawn.dtype == np.uint8
    changed = (drawn != image).any(axis=2)
    assert changed[75:105, 85:135].mean() > 0.9
    assert not changed[:50].any()
    assert (image == 128).all(), "the input is not written to"


def test_scores_below_the_threshold_are_not_drawn():
    instances = predict(60, 80, [(10, 10, 50, 50)], scores=[0.3])
    assert (draw_instances(gray(60, 80), instances, NAMES, score_threshold=0.5) == 128).all()
    assert (draw_instances(gray(60, 80), instances, NAMES, score_threshold=0.3) != 128).any()


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (1, 300), (8, 20000), (300, 2), (5, 2)])
def test_odd_sizes_are_drawn(size):
    height, width = size
    instances = predict(height, width, [(0, 0, width, height)])
    assert draw_instances(gray(*size), instances, NAMES, score_threshold=0.5).shape == (
        height,
        width,
        3,
    )


def test_no_instances_gives_the_image_back():
    assert (
        draw_instances(gray(30, 40), predict(30, 40, []), NAMES, score_threshold=0.5) == 128
    ).all()


def test_empty_mask_and_boxes_without_masks_are_drawn():
    empty = predict(30, 40, [(5, 5, 5, 5)])
    assert draw_instances(gray(30, 40), empty, NAMES, score_threshold=0.5).shape == (30, 40, 3)
    boxes = predict(60, 80, [(10, 10, 50, 50)])
    boxes.remove("pred_masks")
    assert (draw_instances(gray(60, 80), boxes, NAMES, score_threshold=0.5) != 128).any()


@pytest.mark.parametrize("names", [None, [], ["x"]])
def test_classes_without_a_name_are_written_as_numbers(names):
    instances = predict(100, 160, [(10, 10, 150, 90)], classes=[7])
    drawn = draw_instances(gray(100, 160), instances, names)
    named = draw_instances(gray(100, 160), instances, ["7"] * 8)
    assert (drawn == named).all()


def test_each_instance_has_a_color_of_its_own_or_each_class():
    boxes = [(0, 0, 40, 40), (60, 0, 100, 40), (120, 0, 160, 40)]
    instances = predict(40, 160, boxes, classes=[0, 1, 0])
    by_instance = draw_instances(gray(40, 160), instances, labels=False)
    by_class = draw_instances(gray(40, 160), instances, labels=False, color_by="class")
    centers = [(20, 20), (20, 80), (20, 140)]
    assert len({tuple(by_instance[p]) for p in centers}) == 3
    a, b, c = (tuple(by_class[p]) for p in centers)
    assert a == c != b
    with pytest.raises(ValueError, match="color_by is 'score'"):
        draw_instances(gray(40, 160), instances, color_by="score")


def test_another_threshold_keeps_the_colors():
    instances = predict(40, 100, [(0, 0, 40, 40), (60, 0, 100, 40)], scores=[0.3, 0.9])
    both, one = (
        draw_instances(gray(40, 100), instances, labels=False, score_threshold=t)
        for t in (0.0, 0.5)
    )
    assert (both[:, 60:] == one[:, 60:]).all() and (one[:, :40] == 128).all()


def test_small_objects_are_drawn_over_large_ones():
    boxes = [(40, 40, 60, 60), (0, 0, 100, 100)]
    drawn = draw_instances(gray(100, 100), predict(100, 100, boxes), labels=False)
    swapped = draw_instances(gray(100, 100), predict(100, 100, boxes[::-1]), labels=False)
    assert tuple(drawn[50, 50]) != tuple(drawn[10, 10])
    assert (swapped[35, 35] != swapped[50, 50]).any()


def label_pixels(height, width, boxes):
    """(H, W) bool: the pixels that labels change."""
    instances = predict(height, width, boxes)
    without, labeled = (
        draw_instances(gray(height, width), instances, NAMES, labels=x) for x in (False, True)
    )
    return (without != labeled).any(axis=2)


def test_a_label_stands_above_its_object_and_at_the_border_elsewhere_within_the_image():
    rows, columns = np.nonzero(label_pixels(200, 300, [(100, 80, 200, 160)]))
    assert rows.max() < 80 and rows.min() > 50
    assert columns.min() >= 100
    # the whole image, and at each border: a label of the same size, never cut off
    size = np.ptp(rows), np.ptp(columns)
    for box in [(0, 0, 300, 200), (0, 0, 30, 30), (290, 0, 300, 200), (0, 180, 300, 200)]:
        rows, columns = np.nonzero(label_pixels(200, 300, [box]))
        assert (np.ptp(rows), np.ptp(columns)) == size


def test_labels_leave_other_objects_visible():
    """A dense scene: labels are omitted rather than drawn over objects."""
    boxes = [(x, y, x + 22, y + 22) for y in range(0, 240, 24) for x in range(0, 240, 24)]
    covered = label_pixels(240, 240, boxes)
    for x1, y1, x2, y2 in boxes:
        assert covered[y1:y2, x1:x2].mean() <= 0.2


def test_names_beyond_ascii_are_written():
    instances = predict(100, 160, [(10, 30, 150, 90)])
    assert (
        draw_instances(gray(100, 160), instances, ["Größe"])
        != draw_instances(gray(100, 160), instances, ["Gr??e"])
    ).any()


def test_masks_may_be_a_tensor_without_boxes_or_beyond_the_image():
    with_boxes = predict(60, 80, [(10, 10, 50, 50)])
    without = predict(60, 80, [(10, 10, 50, 50)])
    without.remove("pred_boxes")
    expected = draw_instances(gray(60, 80), with_boxes, NAMES)
    assert (draw_instances(gray(60, 80), without, NAMES) == expected).all()
    outside = predict(60, 80, [(10, 10, 50, 50)])
    outside.remove("pred_masks")
    outside.pred_boxes = Boxes(torch.tensor([[-20.0, -5.0, 500.0, 70.0]]))
    assert draw_instances(gray(60, 80), outside, NAMES).shape == (60, 80, 3)


def test_grid_has_image_ground_truth_and_prediction_in_one_row(tmp_path):
    height, width = 100, 120
    polygon = [20.0, 20.0, 60.0, 20.0, 60.0, 60.0, 20.0, 60.0]
    rle = mask_util.encode(np.asfortranarray(np.eye(height, width, dtype=np.uint8)))
    rows = [
        {"bbox": [20, 20, 40, 40], "segmentation": [polygon], "iscrowd": 0},
        {"bbox": [0, 0, 100, 100], "segmentation": rle, "iscrowd": 1},
    ]
    annotations = [
        {**r, "bbox_mode": BoxMode.XYWH_ABS, "category_id": i} for i, r in enumerate(rows)
    ]
    grid = comparison_grid(
        [record(tmp_path, height, width, annotations)],
        [{"instances": predict(height, width, [(70, 30, 110, 90)])}],
        NAMES,
        score_threshold=0.5,
        height=height,
    )
    assert grid.dtype == np.uint8 and grid.ndim == 3
    panels = np.split(grid[-height - 4 : -4, 4:], [width + 4, 2 * (width + 4)], axis=1)
    image, truth, prediction = (p[:height, :width] for p in panels)
    assert (image == 128).all()
    assert (truth[25:55, 25:55] != 128).any(axis=2).mean() > 0.9
    assert (prediction[40:80, 75:105] != 128).any(axis=2).mean() > 0.9
    assert (prediction[:20, :50] == 128).all()


def test_grid_takes_images_of_any_ratio_without_annotations_or_predictions(tmp_path):
    sizes = [(1, 1), (8, 4000), (4000, 8), (50, 70)]
    records = [record(tmp_path, *s, name=f"{i}.png") for i, s in enumerate(sizes)]
    records[-1]["annotations"] = []
    predictions = [predict(*s, []) for s in sizes]
    grid = comparison_grid(records, predictions, NAMES, score_threshold=0.5, height=60)
    assert grid.shape[0] >= len(sizes) * 60
    assert grid.shape[1] <= 3 * 2 * 60 + 40


@pytest.mark.parametrize("size", [(500, 333), (999, 17)])
def test_grid_takes_masks_without_a_pixel_and_of_one_in_a_corner(tmp_path, size):
    height, width = size
    boxes = [(0, 0, 0, 0), (width - 1, height - 1, width, height)]
    plain, drawn = (
        comparison_grid(
            [record(tmp_path, *size)], [predict(*size, b)], NAMES, score_threshold=0.5, height=64
        )
        for b in ([], boxes)
    )
    assert (plain != drawn).any()


def test_grid_of_nothing_is_a_picture_too():
    assert comparison_grid([], [], NAMES, score_threshold=0.5).size > 0


def test_annotations_without_masks_are_drawn_as_boxes(tmp_path):
    box = {"bbox": [5, 5, 30, 30], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}
    grid = comparison_grid(
        [record(tmp_path, 50, 50, [box])],
        [predict(50, 50, [])],
        NAMES,
        score_threshold=0.5,
        height=50,
    )
    truth = grid[-54:-4, 4 + 54 : 4 + 54 + 50]
    assert (truth != 128).any()


def test_differing_numbers_of_records_and_predictions_are_named(tmp_path):
    with pytest.raises(ValueError, match="1 records but 0 predictions"):
        comparison_grid([record(tmp_path, 9, 9)], [], NAMES, score_threshold=0.5)
