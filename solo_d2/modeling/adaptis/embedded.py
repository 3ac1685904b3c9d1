"""An embedded image, ready for any number of points."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from solo_d2.layers.masks import chunk_length
from solo_d2.layers.resample import resize

from .head import resize_corners
from .targets import to_input_frame

# A map of this size stays in a processor's cache, which takes half the time of larger chunks.
_CPU_CHUNK_BYTES = 4 * 1024**2


class ImageEmbedding(NamedTuple):
    """Everything that the decoder needs besides points, for a batch of images."""

    control: Tensor  # (N, ., h, w), result of ``controller.prepare``
    selection: Tensor  # (N, ., h, w), result of ``selection_head.prepare``
    valid: Tensor | None  # (N, 1, h, w) bool, cells that are not padding; None: no padding


@dataclass(frozen=True)
class EmbeddedImage:
    """One embedded image, and its mirror image if results are averaged over both."""

    decode: Callable[[ImageEmbedding, Tensor], Tensor]  # see ``ObjectFinder.decode``
    views: list[ImageEmbedding]  # each of one image
    semantic: Tensor  # (C, H, W) probabilities, without padding
    proposals: Tensor | None  # (H, W) squared probabilities, without padding, if they are used
    size: tuple[int, int]  # height and width of the network's input without padding
    padded_size: tuple[int, int]
    stride: int  # of the feature map
    mirror_offset: int  # the mirror image of column c is padded width - mirror_offset - c

    @torch.no_grad()
    def soft_masks(self, points: Tensor) -> Tensor:
        """Soft masks of points, averaged over the views.

        Args:
            points: (M, 2) rows and columns. They are decoded in chunks of bounded memory.

        Returns:
            (M, h, w) float32, which also cover the padding; see ``enlarge``.
        """
        prepared = self.views[0].selection[0]
        if len(points) == 0:
            return prepared.new_zeros((0, *prepared.shape[-2:]), dtype=torch.float32)
        length = chunk_length(prepared.numel())
        if prepared.device.type == "cpu":
            length = min(length, max(1, _CPU_CHUNK_BYTES // (4 * prepared.numel())))
        chunks = []
        for chunk in points.to(prepared.device).split(length):
            probs = self.decode(self.views[0], chunk[None])[:, 0].float().sigmoid()
            if len(self.views) > 1:
                columns = self.padded_size[1] - self.mirror_offset - chunk[:, 1]
                mirrored = torch.stack([chunk[:, 0], columns], dim=1)
                others = self.decode(self.views[1], mirrored[None])[:, 0].float().sigmoid()
                probs = (probs + others.flip(-1)) / 2
            chunks.append(probs)
        return torch.cat(chunks)

    def enlarge(self, masks: Tensor) -> Tensor:
        """(M, h, w), result of ``soft_masks`` -> (M, H, W) in the frame of the unpadded input."""
        # the published code enlarges probabilities here, but logits in training
        height, width = self.size
        return resize_corners(masks[:, None], self.padded_size)[:, 0, :height, :width]

    @torch.no_grad()
    def prompt(self, points: Any, height: int, width: int) -> Tensor:
        """Soft masks of the objects under points, in the order of the points.

        Args:
            points: (M, 2), x and y in the output frame.
            height, width: output size.

        Returns:
            (M, height, width) float32.

        Raises:
            ValueError: see ``to_input_frame``.
        """
        size = (height, width)
        masks = self.soft_masks(to_input_frame(points, size, self.size))
        chunks = masks.split(chunk_length(max(height * width, self.semantic[0].numel())))
        return torch.cat([resize(self.enlarge(x)[:, None], size)[:, 0] for x in chunks])
