"""AdaptIS as two graphs: an encoder for the image, and a decoder for points."""

from dataclasses import asdict
from typing import Any

from torch import Tensor

from solo_d2.modeling import AdaptIS
from solo_d2.modeling.adaptis.embedded import ImageEmbedding
from solo_d2.modeling.adaptis.head import valid_cells

from .graph import Graph


class AdaptISEncoder(Graph):
    """Everything that does not depend on points."""

    input_names = ("image", "image_size")
    architecture = "AdaptIS"
    model: AdaptIS

    def __init__(self, model: AdaptIS):
        super().__init__(model)
        names = ("control", "selection", "cells", "semantic")
        self.output_names = (*names, "proposals") if model.use_proposals else names

    def options(self) -> dict[str, Any]:
        model = self.model
        return {
            "stride": model.stride,
            "mask_threshold": model.mask_threshold,
            "inference": asdict(model.options),
        }

    def forward(self, image: Tensor, image_size: Tensor) -> tuple[Tensor, ...]:
        """
        Args:
            image: see ``Graph``.
            image_size: (2,) int64 height and width without padding.

        Returns:
            The decoder's inputs: control and selection (1, ., h, w), and which cells are not
            padding (1, 1, h, w) bool; semantic probabilities (1, C, H, W) and, if they are used,
            squared probabilities of proposals (1, H, W).
        """
        model = self.model
        feature = model.feature_map(model.backbone(self.normalized(image)))
        map_size = (feature.shape[-2], feature.shape[-1])
        valid = valid_cells(image_size[None], map_size, 1 / model.stride)
        control, selection, _ = model.embedding_of(feature, valid)
        semantic, proposals = model.maps(feature, (image.shape[-2], image.shape[-1]))
        results = (control, selection, valid, semantic)
        return results if proposals is None else (*results, proposals)


class AdaptISDecoder(Graph):
    """Points to masks, for an image that is encoded."""

    input_names = ("control", "selection", "cells", "points")
    output_names = ("logits",)
    architecture = "AdaptIS decoder"
    model: AdaptIS

    def options(self) -> dict[str, Any]:
        return {}

    def forward(self, control: Tensor, selection: Tensor, cells: Tensor, points: Tensor) -> Tensor:
        """
        Args:
            control, selection, cells: of the encoder.
            points: (1, P, 2) rows and columns in pixels of the input.

        Returns:
            (P, 1, h, w) mask logits.
        """
        return self.model.decode(ImageEmbedding(control, selection, cells), points)
