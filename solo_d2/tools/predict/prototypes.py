"""YOLACT's prototypes as a picture."""

import math
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image

from solo_d2.errors import UserError
from solo_d2.files import atomic_write
from solo_d2.modeling import YOLACT
from solo_d2.predictor import Predictor, Result

from .inputs import Source
from .outputs import Output

_TILE = 160  # longer side, in pixels
_MARGIN = 4


class Prototypes(Output):
    """<name>.prototypes.png: the image, and the prototypes that its masks are combined from."""

    def __init__(self, folder: Path, score: float, predictor: Predictor):
        """
        Raises:
            UserError: the model has no prototypes.
        """
        super().__init__(folder, score)
        if not isinstance(predictor.model, YOLACT):
            raise UserError(f"--prototypes needs YOLACT, not {type(predictor.model).__name__}")
        self.predictor = predictor
        self.model = predictor.model

    def add(self, source: Source, target: Path, result: Result) -> None:
        path = self.folder / target.with_name(f"{target.name}.prototypes.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        picture = draw_prototypes(result.image, self.prototypes(result.image))
        with atomic_write(path) as file:
            Image.fromarray(picture).save(file, format="PNG")

    @torch.no_grad()
    def prototypes(self, image_rgb: np.ndarray) -> np.ndarray:
        """(K, h, w) float32, not negative, of an image (H, W, 3)."""
        images = self.model.preprocess_image([{"image": self.predictor.network_input(image_rgb)}])
        return self.model.dense(images.tensor).prototypes[0].permute(2, 0, 1).cpu().numpy()


def draw_prototypes(image_rgb: np.ndarray, prototypes: np.ndarray) -> np.ndarray:
    """A grid of the image and its prototypes, row by row.

    Args:
        image_rgb: (H, W, 3) uint8.
        prototypes: (K, h, w), not negative; each is scaled to its maximum.

    Returns:
        (H', W', 3) uint8, RGB: dark blue is 0, yellow the maximum.
    """
    scale = _TILE / max(image_rgb.shape[:2])
    size = tuple(max(1, round(side * scale)) for side in image_rgb.shape[1::-1])  # width, height
    tiles = [cv2.resize(image_rgb, size, interpolation=cv2.INTER_AREA)]
    for prototype in prototypes:
        levels = (255 * prototype / max(prototype.max(), 1e-6)).astype(np.uint8)
        enlarged = cv2.resize(levels, size, interpolation=cv2.INTER_NEAREST)
        tiles.append(cv2.applyColorMap(enlarged, cv2.COLORMAP_VIRIDIS)[..., ::-1])
    columns = math.ceil(math.sqrt(len(tiles)))
    cell_w, cell_h = (side + _MARGIN for side in size)
    rows = math.ceil(len(tiles) / columns)
    grid = np.full((rows * cell_h + _MARGIN, columns * cell_w + _MARGIN, 3), 255, np.uint8)
    for i, tile in enumerate(tiles):
        top, left = _MARGIN + i // columns * cell_h, _MARGIN + i % columns * cell_w
        grid[top : top + size[1], left : left + size[0]] = tile
    return grid
