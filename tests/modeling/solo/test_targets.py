import math

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from solo_d2.layers.masks import mass_centers
from solo_d2.modeling.solo.targets import assign_cells, last_claims, level_offsets

NUM_GRIDS = [10, 6, 4]
SCALE_RANGES = [[1, 32], [16, 64], [48, 128]]
OPTIONS = {"num_classes": 5, "num_grids": NUM_GRIDS, "scale_ranges": SCALE_RANGES, "sigma": 0.2}
EXTENT = (96, 128)


def random_instances(seed: int, n: int):
    """Boxes with filled or patchy masks, including empty masks, degenerate boxes and overlaps."""
    g = np.random.default_rng(seed)
    height, width = EXTENT
    masks = np.zeros((n, height, width), dtype=bool)
    boxes = np.zeros((n, 4), dtype=np.float32)
    for i in range(n):
        x1, x2 = np.sort(g.integers(0, width + 1, 2))
        y1, y2 = np.sort(g.integers(0, height + 1, 2))
        masks[i, y1:y2, x1:x2] = g.random((y2 - y1, x2 - x1)) < g.choice([0.02, 1.0])
        boxes[i] = x1, y1, x2, y2
    classes = torch.from_numpy(g.integers(0, 5, n))
    return torch.from_numpy(boxes), classes, torch.from_numpy(masks)


def literal_targets(boxes, classes, masks, inclusive_boxes=False):
    """Steps 1 to 7 of the specification, one instance and one cell at a time."""
    height, width = EXTENT
    grids, pairs = [], []
    f32 = np.float32
    for level, (size, (low, high)) in enumerate(zip(NUM_GRIDS, SCALE_RANGES)):
        grid = np.full((size, size), 5)

        def cell(coordinate, extent, size=size):
            return int(f32(f32(coordinate) / f32(extent)) // f32(1.0 / size))

        for i, (box, mask) in enumerate(zip(boxes.numpy(), masks.numpy())):
            w, h = box[2] - box[0] - inclusive_boxes, box[3] - box[1] - inclusive_boxes
            if not low <= math.sqrt(max(w, 0) * max(h, 0)) <= high or not mask.any():
                continue
            rows, columns = np.nonzero(mask)
            cx, cy = f32(f32(columns.sum()) / f32(len(columns))), f32(f32(rows.sum()) / len(rows))
            hw, hh = f32(f32(0.1) * w), f32(f32(0.1) * h)
            ci, cj = cell(cy, height), cell(cx, width)
            top = max(0, cell(cy - hh, height), ci - 1)
            bottom = min(size - 1, cell(cy + hh, height), ci + 1)
            left = max(0, cell(cx - hw, width), cj - 1)
            right = min(size - 1, cell(cx + hw, width), cj + 1)
            for row in range(top, bottom + 1):
                for column in range(left, right + 1):
                    grid[row, column] = classes[i]
                    pairs.append((level, row * size + column, i))
        grids.append(grid.ravel())
    return np.concatenate(grids), pairs


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 12), st.booleans())
def test_assignment_equals_a_literal_reading_of_the_specification(seed, n, inclusive_boxes):
    boxes, classes, masks = random_instances(seed, n)
    centers, areas = mass_centers(masks)
    targets = assign_cells(
        boxes, classes, centers, areas, EXTENT, inclusive_boxes=inclusive_boxes, **OPTIONS
    )
    categories, pairs = literal_targets(boxes, classes, masks, inclusive_boxes)
    assert targets.categories.tolist() == categories.tolist()
    assert list(zip(*(x.tolist() for x in targets[1:]))) == pairs


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 12))
def test_the_last_claim_on_a_cell_gives_its_category(seed, n):
    boxes, classes, masks = random_instances(seed, n)
    targets = assign_cells(boxes, classes, *mass_centers(masks), EXTENT, **OPTIONS)
    last = last_claims(targets, NUM_GRIDS)
    offsets = torch.tensor(level_offsets(NUM_GRIDS))
    flat = last.cell + offsets[last.level]
    assert flat.tolist() == (targets.categories < 5).nonzero()[:, 0].tolist()
    assert torch.equal(targets.categories[flat], classes[last.instance])


def test_a_matrix_to_check_by_eye():
    # a 40 x 40 square centered at (47.5, 47.5) of a 96 x 128 input, on the 6 x 6 grid of level 1:
    # cells are 21.3 wide and 16 high, so its center is in column 2, row 2; the center region,
    # 8 x 8 pixels, reaches from row 2 (43.5) into row 3 (51.5) and stays in column 2
    mask = torch.zeros(1, 96, 128, dtype=torch.bool)
    mask[0, 28:68, 28:68] = True
    boxes = torch.tensor([[28.0, 28.0, 68.0, 68.0]])
    targets = assign_cells(boxes, torch.tensor([3]), *mass_centers(mask), EXTENT, **OPTIONS)
    start, stop = level_offsets(NUM_GRIDS)[1:3]
    grid = targets.categories[start:stop].view(6, 6)
    assert grid.tolist() == [
        [5, 5, 5, 5, 5, 5],
        [5, 5, 5, 5, 5, 5],
        [5, 5, 3, 5, 5, 5],
        [5, 5, 3, 5, 5, 5],
        [5, 5, 5, 5, 5, 5],
        [5, 5, 5, 5, 5, 5],
    ]
    assert targets.level.tolist() == [1, 1]  # 40 is too large for level 0, too small for level 2


def test_no_instances_leave_background_everywhere():
    boxes, classes, masks = random_instances(0, 0)
    targets = assign_cells(boxes, classes, *mass_centers(masks), EXTENT, **OPTIONS)
    assert targets.categories.tolist() == [5] * level_offsets(NUM_GRIDS)[-1]
    assert [len(x) for x in targets[1:]] == [0, 0, 0]
