"""A picture of colored boxes, and a model for which an object is what has the color of a point."""

from types import SimpleNamespace

import numpy as np
import torch
from detectron2.structures import Instances

HEIGHT, WIDTH = 60, 80
# left, top, right, bottom; the last two have the same color
BOXES = [(5, 5, 25, 20), (40, 10, 60, 50), (10, 35, 20, 45), (65, 35, 75, 45)]
COLORS = [(250, 0, 0), (0, 250, 0), (0, 0, 250), (0, 0, 250)]


class SameColor:
    """Stands in for ``AdaptISPredictor``."""

    embedded = 0  # images, by all of these

    def __init__(self, model, *, resize, input_format):
        pass

    def set_image(self, image):
        self.image = image
        SameColor.embedded += 1

    def predict(self, points, *, exclude):
        masks = [
            (self.image == self.image[y, x]).all(axis=2) & ~exclude
            for x, y in np.asarray(points, int)
        ]
        return instances(masks, [1] * len(masks))


def instances(masks, classes):
    masks = torch.from_numpy(np.stack(masks))
    scores = torch.linspace(0.9, 0.2, len(masks))
    return Instances(
        tuple(masks.shape[1:]), pred_masks=masks, scores=scores, pred_classes=torch.tensor(classes)
    )


def box_mask(left, top, right, bottom):
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[top:bottom, left:right] = True
    return mask


def picture():
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    for (left, top, right, bottom), color in zip(BOXES, COLORS):
        pixels[top:bottom, left:right] = color
    return pixels


def predict(image):
    """Stands in for ``Predictor.predict``: three boxes, the last one with a low score."""
    assert image.shape == (HEIGHT, WIDTH, 3)
    return SimpleNamespace(instances=instances([box_mask(*box) for box in BOXES[:3]], [0, 1, 0]))
