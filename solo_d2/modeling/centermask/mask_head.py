"""The mask head with spatial attention, SAG-Mask (CenterMask, section 3.3)."""

import torch
from detectron2.config import configurable
from detectron2.layers import Conv2d
from detectron2.modeling import ROI_MASK_HEAD_REGISTRY
from detectron2.modeling.roi_heads.mask_head import BaseMaskRCNNHead, MaskRCNNConvUpsampleHead
from fvcore.nn import weight_init
from torch import Tensor, nn
from torch.nn import functional as F


class SpatialAttention(nn.Module):
    """Scales every pixel by a weight in (0, 1), found from its mean and its maximum channel."""

    def __init__(self):
        super().__init__()
        self.conv = Conv2d(2, 1, kernel_size=3, padding=1, bias=False)
        weight_init.c2_msra_fill(self.conv)

    def forward(self, x: Tensor) -> Tensor:
        """(n, C, h, w) -> the same."""
        return x * self.attention(x)

    def attention(self, x: Tensor) -> Tensor:
        """(n, C, h, w) -> (n, 1, h, w)."""
        # The paper has the maximum first; published weights are for this order.
        pooled = torch.cat([x.mean(dim=1, keepdim=True), x.amax(dim=1, keepdim=True)], dim=1)
        return self.conv(pooled).sigmoid()


@ROI_MASK_HEAD_REGISTRY.register()
class SpatialAttentionMaskHead(MaskRCNNConvUpsampleHead):
    """Mask R-CNN's head with spatial attention before the upsampling."""

    @configurable
    def __init__(self, input_shape, **options):
        """Args: see ``MaskRCNNConvUpsampleHead``."""
        super().__init__(input_shape, **options)
        self.attention = SpatialAttention()

    def layers(self, x: Tensor) -> Tensor:
        """(n, in_channels, h, w) -> mask logits (n, C, 2 h, 2 w) of every class."""
        return self.predictor(self.upsampled(x))

    def upsampled(self, x: Tensor) -> Tensor:
        """The feature that masks are predicted from."""
        for conv in self.conv_norm_relus:
            x = conv(x)
        return F.relu(self.deconv(self.attention(x)))

    def class_logits(self, x: Tensor, classes: Tensor) -> Tensor:
        """The same as ``layers`` for one class (n,) each: (n, 2 h, 2 w).

        The logits of the others are not made; with many classes they are most of the memory.
        """
        x = self.upsampled(x)
        if self.predictor.out_channels == 1:  # masks that know no class
            return self.predictor(x)[:, 0]
        weight = self.predictor.weight.flatten(1)[classes]
        logits = torch.einsum("nchw,nc->nhw", x, weight)
        return logits + self.predictor.bias[classes][:, None, None]


def class_mask_logits(head: BaseMaskRCNNHead, x: Tensor, classes: Tensor) -> Tensor:
    """Mask logits (n, H, W) of one class each, from any of Detectron2's mask heads.

    Args:
        head: may predict one mask for all classes.
        x: (n, in_channels, h, w) pooled features.
        classes: (n,).
    """
    if isinstance(head, SpatialAttentionMaskHead):
        return head.class_logits(x, classes)
    logits = head.layers(x)
    if logits.shape[1] == 1:
        return logits[:, 0]
    return logits[torch.arange(len(logits), device=logits.device), classes]
