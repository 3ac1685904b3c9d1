"""A model that finds the same instances in every image, and files as its input."""

import numpy as np
import pytest
import torch
from detectron2.data import transforms as T
from detectron2.structures import Boxes, Instances
from PIL import Image

from solo_d2.predictor import Predictor


class TopLeftModel(torch.nn.Module):
    """Finds two instances in any image: the top left quarter, class 1, and a tiny one."""

    scores = (0.8, 0.1)

    def forward(self, batched_inputs):
        (inputs,) = batched_inputs
        height, width = inputs["height"], inputs["width"]
        masks = torch.zeros(2, height, width, dtype=torch.bool)
        masks[0, : max(1, height // 2), : max(1, width // 2)] = True
        masks[1, 0, 0] = True
        boxes = [[0.0, 0.0, max(1, width // 2), max(1, height // 2)], [0.0, 0.0, 1.0, 1.0]]
        instances = Instances(
            (height, width),
            pred_masks=masks,
            pred_boxes=Boxes(torch.tensor(boxes)),
            scores=torch.tensor(self.scores),
            pred_classes=torch.tensor([1, 0]),
        )
        return [{"instances": instances}]


class EmptyModel(TopLeftModel):
    def forward(self, batched_inputs):
        (output,) = super().forward(batched_inputs)
        return [{"instances": output["instances"][:0]}]


@pytest.fixture
def make_predictor():
    def make(empty=False):
        return Predictor(
            EmptyModel() if empty else TopLeftModel(),
            resize=T.ResizeShortestEdge(32, 64),
            input_format="RGB",
            names=["disc", "bar"],
            category_ids=[7, 9],
        )

    return make


@pytest.fixture
def save_image():
    def save(path, height=20, width=30, **options):
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.arange(height * width * 3, dtype=np.uint8).reshape(height, width, 3)
        Image.fromarray(pixels).save(path, **options)
        return path

    return save
