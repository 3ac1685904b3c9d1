"""The mask re-scoring network of YOLACT++."""

from torch import Tensor, nn
from torch.nn import functional as F

from .pyramid import xavier_conv

_WIDTHS = (8, 16, 32, 64, 128)
# What five strided convolutions without padding leave one pixel of.
_MIN_SIZE = 2 ** (len(_WIDTHS) + 1) - 1


class MaskIoUHead(nn.Module):
    """From a soft mask, its IoU with the truth were it of each class (YOLACT++, section 4.1)."""

    def __init__(self, *, num_classes: int):
        """
        Args:
            num_classes: C, without background.
        """
        super().__init__()
        for i, (before, after) in enumerate(zip((1, *_WIDTHS), _WIDTHS)):
            self.add_module(
                f"conv{i}", xavier_conv(before, after, 3, stride=2, padding=0, relu=True)
            )
        self.predictor = xavier_conv(_WIDTHS[-1], num_classes, 1, relu=True)

    def forward(self, masks: Tensor) -> Tensor:
        """Soft masks (n, h, w), cropped but not thresholded -> (n, C), not negative."""
        h, w = masks.shape[-2:]
        # small inputs grow at the right and bottom by what looks like cropped away
        x = F.pad(masks[:, None], (0, max(0, _MIN_SIZE - w), 0, max(0, _MIN_SIZE - h)))
        for i in range(len(_WIDTHS)):
            x = getattr(self, f"conv{i}")(x)
        return self.predictor(x).amax(dim=(2, 3))
