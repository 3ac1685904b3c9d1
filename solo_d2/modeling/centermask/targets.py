"""Assignment of locations to objects (FCOS, arXiv 1904.01355, sections 3.1 and 3.2)."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def level_locations(size: tuple[int, int], stride: int, device: torch.device) -> Tensor:
    """(h * w, 2) x, y in input pixels: the centers of a level's cells, row-major."""
    y, x = (_cell_centers(n, stride, device) for n in size)
    return torch.stack([x.expand(len(y), -1), y[:, None].expand(-1, len(x))], dim=-1).flatten(0, 1)


def assign_locations(
    boxes: Tensor,
    sizes: Sequence[tuple[int, int]],
    *,
    strides: Sequence[int],
    borders: Sequence[float],
    radius: float,
) -> Tensor:
    """The box that each location is assigned to.

    A box claims a location that lies inside it, less than ``radius`` strides from its center along
    each axis, if the distance to the box's furthest side is in the range of the location's level.
    If several boxes claim a location, the smallest gets it; of equal ones, the first.

    Args:
        boxes: (N, M, 4) x1, y1, x2, y2 in input pixels. Boxes without area, such as those that pad
            an image to M, get no location; M = 0 is ordinary.
        sizes: height and width of each level's map.
        strides: strides of the levels.
        borders: between the ranges of the levels, in pixels; a border belongs to both ranges.
        radius: 0 for no limit.

    Returns:
        (N, L) int64 index of a box, or M for none; level by level, row-major.
    """
    boxes = boxes.float()
    area = (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])
    order = area.argsort(dim=1, stable=True)
    x1, y1, x2, y2 = boxes.gather(1, order[..., None].expand_as(boxes)).unbind(dim=2)
    order = F.pad(order, (0, 1), value=boxes.shape[1])

    owners = []
    ranges = zip((-1.0, *borders), (*borders, float("inf")))
    for (height, width), stride, limits in zip(sizes, strides, ranges):
        # Both tests treat each axis separately, so that location-box pairs need only bools.
        points_y = _cell_centers(height, stride, boxes.device)
        points_x = _cell_centers(width, stride, boxes.device)
        inside_y, far_y = _test_axis(points_y, y1, y2, limits, radius * stride)
        inside_x, far_x = _test_axis(points_x, x1, x2, limits, radius * stride)
        claimed = inside_y[:, :, None] & inside_x[:, None] & (far_y[:, :, None] | far_x[:, None])
        # A last column claims everything. The boxes are sorted by area, so the first maximum is the
        # smallest box.
        claimed = F.pad(claimed.to(torch.uint8), (0, 1), value=1)
        owners.append(order.gather(1, claimed.max(dim=-1).indices.flatten(1)))
    return torch.cat(owners, dim=1)


def _cell_centers(count: int, stride: int, device: torch.device) -> Tensor:
    return torch.arange(count, dtype=torch.float32, device=device) * stride + stride // 2


def _test_axis(
    points: Tensor, low: Tensor, high: Tensor, limits: tuple[float, float], radius: float
) -> tuple[Tensor, Tensor]:
    """(N, points, M): inside and within the upper limit; at or above the lower limit."""
    points, low, high = points[:, None], low[:, None], high[:, None]
    furthest = torch.maximum(points - low, high - points)
    if radius > 0:
        center = (low + high) * 0.5
        low = torch.maximum(low, center - radius)
        high = torch.minimum(high, center + radius)
    inside = (points > low) & (points < high) & (furthest <= limits[1])
    return inside, furthest >= limits[0]


def box_distances(locations: Tensor, boxes: Tensor) -> Tensor:
    """Distances (P, 4) from locations (P, 2) to the left, top, right, bottom of boxes (P, 4)."""
    return torch.cat([locations - boxes[:, :2], boxes[:, 2:] - locations], dim=1)


def distances_to_boxes(locations: Tensor, distances: Tensor) -> Tensor:
    """The inverse of ``box_distances``: (P, 2) and (P, 4) -> (P, 4)."""
    return torch.cat([locations - distances[:, :2], locations + distances[:, 2:]], dim=1)


def centerness(distances: Tensor) -> Tensor:
    """(P, 4) positive distances in any unit -> (P,), 1 in the middle, toward 0 at a side."""
    pairs = distances.view(-1, 2, 2)  # left and top, right and bottom
    return (pairs.amin(dim=1) / pairs.amax(dim=1)).prod(dim=1).sqrt()
