import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import box_iou

from solo_d2.layers.boxes import box_areas, box_intersections, box_ious


def random_boxes(generator: torch.Generator, n: int) -> torch.Tensor:
    """On a coarse grid, so that equal and nested boxes and boxes without area occur."""
    corners = torch.randint(0, 6, (n, 2, 2), generator=generator).sort(dim=1).values
    return corners.reshape(n, 4).float()


@given(st.integers(0, 10**6), st.integers(0, 5), st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_ious_are_those_of_torchvision(seed, n, m):
    g = torch.Generator().manual_seed(seed)
    a, b = random_boxes(g, n), random_boxes(g, m)
    torch.testing.assert_close(box_ious(a, b), box_iou(a, b), equal_nan=True)
    shared = box_intersections(a, b)
    assert shared.shape == (n, m)
    assert (shared <= torch.minimum(box_areas(a)[:, None], box_areas(b)) + 1e-6).all()


def test_ious_of_groups_are_those_of_each():
    g = torch.Generator().manual_seed(0)
    a, b = random_boxes(g, 12).view(3, 4, 4), random_boxes(g, 15).view(3, 5, 4)
    for i, ious in enumerate(box_ious(a, b)):
        torch.testing.assert_close(ious, box_ious(a[i], b[i]), equal_nan=True)


def test_areas_and_intersections_to_check_by_eye():
    boxes = torch.tensor([[0.0, 0, 4, 3], [2, 1, 6, 2], [9, 9, 9, 12]])
    assert box_areas(boxes).tolist() == [12, 4, 0]
    assert box_intersections(boxes, boxes).tolist() == [[12, 2, 0], [2, 4, 0], [0, 0, 0]]
    torch.testing.assert_close(box_ious(boxes[:1], boxes[1:2]), torch.tensor([[2 / 14]]))
