"""Training inputs that the tests of all architectures share."""

import torch
from detectron2.structures import BitMasks, Boxes, Instances

from solo_d2.layers.masks import tight_boxes

SIZE = (64, 96)
NUM_CLASSES = 3


def example(masks: torch.Tensor, boxes=None, size=SIZE) -> dict:
    """A training input with the given masks and, by default, their tight boxes."""
    instances = Instances(size)
    instances.gt_boxes, instances.gt_classes = Boxes(torch.zeros(0, 4)), torch.zeros(0).long()
    if len(masks):  # like Detectron2's mapper: without annotations there is no gt_masks
        instances = Instances(size)
        boxes = tight_boxes(masks) if boxes is None else torch.as_tensor(boxes).float()
        instances.gt_boxes = Boxes(boxes)
        instances.gt_classes = torch.arange(len(masks)) % NUM_CLASSES
        instances.gt_masks = BitMasks(masks)
    image = torch.rand(3, *size, generator=torch.Generator().manual_seed(1)) * 255
    return {"image": image, "instances": instances, "file_name": "street.jpg"}


def rectangle(x1, y1, x2, y2, size=SIZE) -> torch.Tensor:
    mask = torch.zeros(1, *size, dtype=torch.bool)
    mask[:, y1:y2, x1:x2] = True
    return mask


def many(n: int) -> torch.Tensor:
    corners = torch.randint(0, 56, (n, 2), generator=torch.Generator().manual_seed(2)).tolist()
    return torch.cat([rectangle(x, y, x + 8, y + 8) for x, y in corners])


NONE = torch.zeros(0, *SIZE, dtype=torch.bool)
EMPTY = torch.zeros(1, *SIZE, dtype=torch.bool)
ORDINARY = rectangle(10, 10, 50, 50)

# What every architecture must train on.
BATCHES = {
    "one ordinary image": [example(ORDINARY)],
    "no instance at all": [example(NONE), example(NONE)],
    "half-empty": [example(ORDINARY), example(NONE)],
    "mask empty after cropping": [example(EMPTY, boxes=[[10, 10, 50, 50]])],
    "1-pixel mask": [example(rectangle(5, 5, 6, 6))],
    "mask outside of its box": [example(ORDINARY, boxes=[[60, 20, 90, 50]])],
    "zero-area box": [example(ORDINARY, boxes=[[10, 10, 10, 50]])],
    "inverted box": [example(ORDINARY, boxes=[[50, 50, 10, 10]])],
    "box out of the image": [example(ORDINARY, boxes=[[200, 200, 260, 260]])],
    "huge box": [example(ORDINARY, boxes=[[-3000, -3000, 3000, 3000]])],
    "mask that vanishes at a quarter": [example(rectangle(4, 4, 5, 40))],
    "500 instances": [example(many(500))],
    "images of different sizes": [
        example(ORDINARY),
        example(rectangle(0, 0, 30, 30, size=(33, 70)), size=(33, 70)),
    ],
}
