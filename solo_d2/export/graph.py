"""A model as one function of tensors, whose results all have fixed numbers of entries."""

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor, nn

# Where eager takes every candidate above a threshold, a graph takes so many of the best.
MAX_CANDIDATES = 500


class Graph(nn.Module, ABC):
    """One image -> D detections with a validity mask; what is exported.

    It runs the model's own ``dense`` and the functions that eager's selection is made of, but
    selects by top-K and masks instead of by counts that depend on the image.

    Attributes:
        input_names, output_names: of ``forward``.
        architecture: which ``exported`` class reads the outputs.
    """

    input_names: tuple[str, ...] = ("image",)
    output_names: tuple[str, ...]
    architecture: str

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model.eval()

    @abstractmethod
    def forward(self, image: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        """
        Args:
            image: (1, 3, H, W) float32, values 0 to 255, in the model's channel order, padded at
                the right and bottom with the pixel mean.
            others: by ``input_names``.
        """

    @abstractmethod
    def options(self) -> dict[str, Any]:
        """What must be known to make instances of the outputs; goes into the file's metadata."""

    @property
    def divisibility(self) -> int:
        """H and W are multiples of this."""
        return max(1, self.model.backbone.size_divisibility)

    @property
    def fixed_size(self) -> tuple[int, int] | None:
        """H and W where the network has one size."""
        return None

    def normalized(self, image: Tensor) -> Tensor:
        """As ``preprocess_image`` of the models: zero in the padding."""
        return (image - self.model.pixel_mean) / self.model.pixel_std


def best_first(scores: Tensor, valid: Tensor, limit: int) -> Tensor:
    """(limit,) indices by descending score, valid entries before all others; ties in order.

    Args:
        scores: (K,), not negative where valid.
        valid: (K,) bool.
        limit: at most K.
    """
    return scores.where(valid, -1).sort(descending=True, stable=True).indices[:limit]
