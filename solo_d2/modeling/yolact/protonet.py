"""The prototypes of YOLACT, and masks as their linear combinations."""

import torch
from torch import Tensor, nn

from solo_d2.layers.resample import upsample2x

from .pyramid import xavier_conv


class Protonet(nn.Module):
    """Prototypes of an image at twice the size of the finest level (YOLACT, section 3.1)."""

    def __init__(self, *, in_channels: int, num_masks: int, norm: str = ""):
        """
        Args:
            in_channels: of the finest level.
            num_masks: K, prototypes.
            norm: of all convolutions but the last.
        """
        super().__init__()
        self.conv0 = xavier_conv(in_channels, in_channels, 3, relu=True, norm=norm)
        self.conv1 = xavier_conv(in_channels, in_channels, 3, relu=True, norm=norm)
        self.conv2 = xavier_conv(in_channels, in_channels, 3, relu=True, norm=norm)
        self.conv3 = xavier_conv(in_channels, in_channels, 3, relu=True, norm=norm)
        self.predictor = xavier_conv(in_channels, num_masks, 1, relu=True)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, h, w) -> (N, 2h, 2w, K) float32, not negative."""
        x = upsample2x(self.conv2(self.conv1(self.conv0(x))))
        return self.predictor(self.conv3(x)).permute(0, 2, 3, 1).float()


def assemble_masks(prototypes: Tensor, coefficients: Tensor) -> Tensor:
    """Soft masks of one image: combinations of its prototypes (YOLACT, section 3.2).

    Args:
        prototypes: (h, w, K).
        coefficients: (n, K); n = 0 stays connected to both.

    Returns:
        (n, h, w) in 0 to 1; where all prototypes are zero, one half.
    """
    h, w, k = prototypes.shape
    logits = coefficients @ prototypes.reshape(-1, k).T
    return logits.view(-1, h, w).sigmoid()


def inside_boxes(boxes: Tensor, size: tuple[int, int], *, padding: float = 1.0) -> Tensor:
    """Which pixels of a raster the published crop leaves.

    Column c is left if x1 - padding <= c < x2 + padding, in pixels: the index counts, not the
    middle of the pixel. Rows likewise.

    Args:
        boxes: (n, 4) x1, y1, x2, y2 in pixels of the raster; ends in any order.
        size: height and width of the raster.
        padding: in its pixels.

    Returns:
        (n, *size) bool.
    """
    low = torch.minimum(boxes[:, :2], boxes[:, 2:]) - padding
    high = torch.maximum(boxes[:, :2], boxes[:, 2:]) + padding
    inside = []
    for axis, length in ((1, size[0]), (0, size[1])):
        index = torch.arange(length, device=boxes.device)
        inside.append((low[:, axis, None] <= index) & (index < high[:, axis, None]))
    rows, columns = inside
    return rows[:, :, None] & columns[:, None, :]
