"""The prediction head of YOLACT."""

import torch
from torch import Tensor, nn

from .pyramid import xavier_conv


class YOLACTHead(nn.Module):
    """Boxes, classes and mask coefficients of each anchor; the same weights for all levels."""

    def __init__(
        self,
        *,
        in_channels: int,
        num_anchors: int,
        num_classes: int,
        num_masks: int,
        predictor_gain: float = 1.0,
        norm: str = "",
    ):
        """
        Args:
            in_channels: of every level.
            num_anchors: A, at each location.
            num_classes: C, without background.
            num_masks: K, prototypes.
            predictor_gain: factor on the initial weights of the three outputs.
            norm: of the shared convolution.
        """
        super().__init__()
        self.num_anchors = num_anchors
        self.shared = xavier_conv(in_channels, in_channels, 3, relu=True, norm=norm)
        outputs = (4, num_classes + 1, num_masks)
        self.box_pred, self.class_logits, self.coefficient_pred = (
            xavier_conv(in_channels, num_anchors * channels, 3, gain=predictor_gain)
            for channels in outputs
        )

    def forward(self, levels: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """
        Args:
            levels: (N, in_channels, h, w) each.

        Returns:
            For the P anchors in the order level, row, column, anchor, all in float32: box offsets
            (N, P, 4), class logits (N, P, C + 1) with background first, mask coefficients
            (N, P, K) in -1 to 1.
        """
        shared = [self.shared(level) for level in levels]
        offsets, logits, coefficients = (
            torch.cat([self._per_anchor(pred(x)) for x in shared], dim=1).float()
            for pred in (self.box_pred, self.class_logits, self.coefficient_pred)
        )
        return offsets, logits, coefficients.tanh()

    def _per_anchor(self, x: Tensor) -> Tensor:
        """(N, A * D, h, w) -> (N, h * w * A, D)."""
        n, channels = x.shape[:2]
        return x.permute(0, 2, 3, 1).reshape(n, -1, channels // self.num_anchors)
