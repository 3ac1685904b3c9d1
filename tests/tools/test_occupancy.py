"""Objects with and without grid cells, counted by hand on small grids."""

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.structures import BoxMode

from solo_d2.layers.masks import mass_centers
from solo_d2.tools.occupancy import Grids, NetworkInput, Objects, advise, occupancy

EXTENT = (100, 100)


def objects(*squares, extent=EXTENT):
    """Objects from (x, y, side) of each, center and side."""
    rows = torch.tensor(squares, dtype=torch.float32).reshape(-1, 3)
    centers, half = rows[:, :2], rows[:, 2:] / 2
    boxes = torch.cat([centers - half, centers + half], dim=1)
    return Objects(boxes, centers, rows[:, 2].square().long(), extent)


def grids(num_grids=(10,), scale_ranges=((1, 50),), sigma=0.0):
    return Grids(list(num_grids), [list(bounds) for bounds in scale_ranges], sigma)


def test_the_later_of_two_in_a_cell_gets_it():
    counts = occupancy([objects((15, 15, 8), (16, 14, 6), (55, 55, 8))], grids())
    assert counts.levels == [(3, 2, 1)]
    assert (counts.objects, counts.lost, counts.out_of_range, counts.empty) == (3, 1, 0, 0)
    assert counts.without_cell == 1


def test_sharing_some_cells_is_not_losing_all():
    # center regions of 3 x 1 cells; the second takes two cells from the first
    wide = objects((25, 15, 20), (35, 15, 20))
    counts = occupancy([wide], grids(sigma=1.0))
    assert counts.levels == [(2, 2, 0)]
    assert counts.lost == 0


def test_a_cell_on_one_of_several_levels_is_enough():
    image = objects((15, 15, 8), (18, 18, 8))
    counts = occupancy([image], grids((10, 50), ((1, 50), (1, 50))))
    assert counts.levels == [(2, 2, 1), (2, 0, 0)]
    assert counts.lost == 0


def test_images_do_not_compete():
    counts = occupancy([objects((15, 15, 8)), objects((15, 15, 8))], grids())
    assert counts.levels == [(2, 0, 0)]


def test_objects_out_of_range_or_without_pixels():
    image = objects((15, 15, 4), (55, 55, 60), (75, 75, 8), (35, 35, 20))
    image.areas[2] = 0
    counts = occupancy([image], grids(scale_ranges=((5, 50),)))
    assert (counts.out_of_range, counts.empty, counts.lost) == (2, 1, 0)
    assert counts.levels[0].assigned == 1


def test_no_objects_and_no_images_are_ordinary():
    nothing = occupancy([objects()], grids())
    assert nothing == occupancy([], grids())
    assert nothing.without_cell == nothing.objects == 0
    assert advise([objects()], grids(), nothing) == []


def test_advice_closes_ranges_just_as_far_as_needed():
    images = [objects((15, 15, 2.5), (55, 55, 9.5)), objects((15, 15, 30), (55, 55, 70.2))]
    settings = grids((10, 10), ((4, 8), (12, 60)))
    now = occupancy(images, settings)
    assert now.out_of_range == 3
    (advice,) = advise(images, settings, now)
    assert advice.key == "MODEL.SOLO.SCALE_RANGES"
    assert advice.value == [[2, 8], [9, 71]]
    assert advice.occupancy.out_of_range == 0


def test_advice_promises_what_a_recount_gives():
    generator = torch.Generator().manual_seed(0)
    rows = torch.rand(60, 3, generator=generator) * torch.tensor([100, 100, 30]) + 1
    images = [objects(*rows.tolist(), extent=(104, 104))]
    settings = grids((8, 6), ((1, 20), (10, 50)), sigma=0.2)
    now = occupancy(images, settings)
    assert now.lost > 0
    advice = advise(images, settings, now)
    assert "MODEL.SOLO.NUM_GRIDS" in [x.key for x in advice]
    fields = {"NUM_GRIDS": "num_grids", "SCALE_RANGES": "scale_ranges", "CENTER_SIGMA": "sigma"}
    for one in advice:
        changed = settings._replace(**{fields[one.key.split(".")[-1]]: one.value})
        assert occupancy(images, changed) == one.occupancy
        assert one.occupancy.without_cell < now.without_cell
        assert one.cells == sum(number**2 for number in changed.num_grids)
    left = [one.occupancy.without_cell for one in advice]
    assert left == sorted(left)


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
    seen = NetworkInput(min_size=80, max_size=200, size_divisibility=32).objects(
        record(mask, mask, crowds=[1])
    )
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
    seen = NetworkInput(min_size=80, max_size=200).objects(data)
    assert seen.areas.tolist() == [800]
    assert polygon["segmentation"] == [[30, 10, 50, 10, 50, 20, 30, 20]]  # not modified
    assert seen.extent == (80, 120)


@pytest.mark.parametrize("count", [0, 1, 65, 130])
def test_masks_are_drawn_in_chunks(count):
    masks = np.zeros((max(count, 1), 24, 24), np.uint8)
    for i in range(count):
        masks[i, i % 20 : i % 20 + 3, i // 8 : i // 8 + 2] = 1
    data = record(*masks)
    data["annotations"] = data["annotations"][:count]
    seen = NetworkInput(min_size=0, max_size=0).objects(data)
    centers, areas = mass_centers(torch.from_numpy(masks[:count]).bool())
    assert torch.equal(seen.centers, centers)
    assert torch.equal(seen.areas, areas)
    assert seen.boxes.shape == (count, 4)


def test_a_mask_may_vanish_when_the_image_shrinks():
    mask = np.zeros((400, 400), np.uint8)
    mask[201, 201] = 1
    assert NetworkInput(min_size=50, max_size=50).objects(record(mask)).areas.tolist() == [0]
    assert NetworkInput(min_size=400, max_size=400).objects(record(mask)).areas.tolist() == [1]
