"""Objects with and without grid cells, counted by hand on small grids."""

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.structures import BoxMode

from solo_d2.config import load_config
from solo_d2.layers.masks import mass_centers
from solo_d2.tools.occupancy import Cells, Objects


def cells(num_grids=(10,), scale_ranges=((1, 50),), sigma=0.0, min_size=0, max_size=1333):
    cfg = load_config("quick/solov2_shapes.yaml")
    cfg.MODEL.SOLO.NUM_GRIDS = list(num_grids)
    cfg.MODEL.SOLO.SCALE_RANGES = [list(bounds) for bounds in scale_ranges]
    cfg.MODEL.SOLO.CENTER_SIGMA = sigma
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = min_size, max_size
    return Cells(cfg)


def objects(*squares):
    """Objects in 100 x 100 pixels from (x, y, side) of each, center and side."""
    rows = torch.tensor(squares, dtype=torch.float32).reshape(-1, 3)
    centers, half = rows[:, :2], rows[:, 2:] / 2
    boxes = torch.cat([centers - half, centers + half], dim=1)
    return Objects(boxes, centers, rows[:, 2].square().long(), (100, 100))


def count(*images, **settings):
    counts = cells(**settings)
    for image in images:
        counts.add(image)
    return counts


def test_the_later_of_two_in_a_cell_gets_it():
    counts = count(objects((15, 15, 8), (16, 14, 6), (55, 55, 8)))
    assert counts.levels == [[3, 1]]
    assert (counts.objects, counts.lost, counts.without_cell) == (3, 1, 1)


def test_sharing_some_cells_is_not_losing_all():
    # center regions of 3 x 1 cells; the second takes two cells from the first
    counts = count(objects((25, 15, 20), (35, 15, 20)), sigma=1.0)
    assert counts.levels == [[2, 0]]
    assert counts.without_cell == 0


def test_a_cell_on_one_of_several_levels_is_enough():
    image = objects((15, 15, 8), (18, 18, 8))
    counts = count(image, num_grids=(10, 50), scale_ranges=((1, 50), (1, 50)))
    assert counts.levels == [[2, 1], [2, 0]]
    assert counts.without_cell == 0


def test_images_do_not_compete():
    counts = count(objects((15, 15, 8)), objects((15, 15, 8)))
    assert counts.levels == [[2, 0]]


def test_objects_out_of_range_or_without_pixels():
    image = objects((15, 15, 4), (55, 55, 60), (75, 75, 8), (35, 35, 20), (85, 15, 10))
    image.areas[2] = 0
    counts = count(image, num_grids=(10, 10), scale_ranges=((5, 9), (12, 50)))
    assert (counts.too_small, counts.out_of_range, counts.empty, counts.lost) == (1, 2, 1, 0)
    assert counts.levels == [[0, 0], [1, 0]]
    assert torch.cat(counts.scales).tolist() == [4, 60, 20, 10]


def test_no_objects_and_no_images_are_ordinary():
    for counts in (count(), count(objects())):
        assert counts.without_cell == counts.objects == 0
        assert counts.levels == [[0, 0]]


def record(*masks, crowds=()):
    annotations = [
        {
            "bbox": mask_util.toBbox(mask_util.encode(np.asfortranarray(mask))).tolist(),
            "bbox_mode": BoxMode.XYWH_ABS,
            "category_id": 0,
            "iscrowd": int(i in crowds),
            "segmentation": mask_util.encode(np.asfortranarray(mask)),
        }
        for i, mask in enumerate(masks)
    ]
    height, width = masks[0].shape
    return {"height": height, "width": width, "annotations": annotations}


def test_masks_are_resized_and_padded_as_for_the_network():
    mask = np.zeros((40, 60), np.uint8)
    mask[10:20, 30:50] = 1
    seen = cells(min_size=80, max_size=200).see(record(mask, mask, crowds=[1]))
    assert seen.boxes.tolist() == [[60, 20, 100, 40]]
    assert seen.areas.tolist() == [800]
    assert seen.centers.tolist() == [[79.5, 29.5]]
    assert seen.extent == (96, 128)


def test_polygons_are_drawn_after_resizing():
    polygon = {
        "bbox": [30, 10, 20, 10],
        "bbox_mode": BoxMode.XYWH_ABS,
        "category_id": 0,
        "segmentation": [[30, 10, 50, 10, 50, 20, 30, 20]],
    }
    data = {"height": 40, "width": 60, "annotations": [polygon]}
    seen = cells(min_size=80, max_size=200).see(data)
    assert seen.areas.tolist() == [800]
    assert polygon["segmentation"] == [[30, 10, 50, 10, 50, 20, 30, 20]]  # not modified
    assert seen.extent == (96, 128)


@pytest.mark.parametrize("count", [0, 1, 65, 130])
def test_masks_are_drawn_in_chunks(count):
    masks = np.zeros((max(count, 1), 24, 24), np.uint8)
    for i in range(count):
        masks[i, i % 20 : i % 20 + 3, i // 8 : i // 8 + 2] = 1
    data = record(*masks)
    data["annotations"] = data["annotations"][:count]
    seen = cells().see(data)
    centers, areas = mass_centers(torch.from_numpy(masks[:count]).bool())
    assert torch.equal(seen.centers, centers)
    assert torch.equal(seen.areas, areas)
    assert seen.boxes.shape == (count, 4)


def test_a_mask_may_vanish_when_the_image_shrinks():
    mask = np.zeros((400, 400), np.uint8)
    mask[201, 201] = 1
    assert cells(min_size=50, max_size=50).see(record(mask)).areas.tolist() == [0]
    assert cells(min_size=400, max_size=400).see(record(mask)).areas.tolist() == [1]
