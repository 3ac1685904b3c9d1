"""Point prompts: one image, many questions."""

from typing import Any

import numpy as np
from detectron2.data import transforms as T
from detectron2.structures import Instances

from solo_d2.data.augmentation import to_network_input

from .adaptis import AdaptIS, View


class AdaptISPredictor:
    """Set an image once, then ask what lies under points, any number of times.

    The backbone, the semantic head and all else that does not depend on points run in
    ``set_image`` only.
    """

    def __init__(self, model: AdaptIS, *, resize: T.Augmentation, input_format: str):
        """
        Args:
            model: in eval mode.
            resize: brings an image to the size that the model is for; a config's is
                ``solo_d2.data.augmentation.test_resize(cfg)``.
            input_format: "RGB" or "BGR", the channel order that the model takes.

        Raises:
            ValueError: the model is not one that takes points.
        """
        if not isinstance(model, AdaptIS):
            raise ValueError(f"points need an AdaptIS model, not {type(model).__name__}")
        self.model = model
        self.resize = resize
        self.input_format = input_format
        self._views: list[View] | None = None
        self._size = (0, 0)

    def set_image(self, image_rgb: np.ndarray) -> None:
        """Run everything that does not depend on points.

        Args:
            image_rgb: (H, W, 3) uint8.
        """
        self._views = None  # a bad image does not leave the one before it
        tensor = to_network_input(image_rgb, self.resize, self.input_format)
        self._views = self.model.views({"image": tensor})
        self._size = (image_rgb.shape[0], image_rgb.shape[1])

    def predict(self, points: Any) -> Instances:
        """
        Args:
            points: (N, 2), x and y in pixels of the image given to ``set_image``; an array, a
                tensor or nested lists.

        Returns:
            On the CPU, one instance per point and in their order; see ``AdaptIS.prompt``.

        Raises:
            ValueError: there is no image yet, no point, or a point that is not in the image.
        """
        if self._views is None:
            raise ValueError("no image; call set_image first")
        return self.model.prompt(self._views, points, *self._size).to("cpu")
