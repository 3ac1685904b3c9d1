"""The mask head with spatial attention, SAG-Mask (CenterMask, section 3.3)."""

import torch
from detectron2.config import configurable
from detectron2.layers import Conv2d, ShapeSpec
from detectron2.modeling import ROI_MASK_HEAD_REGISTRY
from detectron2.modeling.roi_heads.mask_head import MaskRCNNConvUpsampleHead
from fvcore.nn import weight_init
from torch import Tensor, nn
from torch.nn import functional as F


class SpatialAttention(nn.Module):
    """Multiplies each pixel by a weight in (0, 1) from the mean and maximum over its channels."""

    def __init__(self):
        super().__init__()
        self.conv = Conv2d(2, 1, kernel_size=3, padding=1, bias=False)
        weight_init.c2_msra_fill(self.conv)

    def forward(self, x: Tensor) -> Tensor:
        """(R, channels, S, S) -> the same."""
        return x * self.attention(x)

    def attention(self, x: Tensor) -> Tensor:
        """(R, channels, S, S) -> (R, 1, S, S)."""
        # The paper has the maximum first; the published weights need this order.
        pooled = torch.cat([x.mean(dim=1, keepdim=True), x.amax(dim=1, keepdim=True)], dim=1)
        return self.conv(pooled).sigmoid()


@ROI_MASK_HEAD_REGISTRY.register()
class SpatialAttentionMaskHead(MaskRCNNConvUpsampleHead):
    """Mask R-CNN's head with spatial attention before the upsampling.

    Detectron2's own ROI heads call it like any mask head; ``CenterMaskROIHeads`` calls
    ``class_logits``.
    """

    @configurable
    def __init__(
        self,
        input_shape: ShapeSpec,
        *,
        num_classes: int,
        conv_dims: list[int],
        conv_norm: str = "",
        loss_weight: float = 1.0,
        vis_period: int = 0,
    ):
        """Args: see ``MaskRCNNConvUpsampleHead``."""
        super().__init__(
            input_shape,
            num_classes=num_classes,
            conv_dims=conv_dims,
            conv_norm=conv_norm,
            loss_weight=loss_weight,
            vis_period=vis_period,
        )
        self.attention = SpatialAttention()
        for layer in self.modules():
            if isinstance(layer, nn.ReLU):
                layer.inplace = True

    def layers(self, x: Tensor) -> Tensor:
        """(R, in_channels, S, S) -> mask logits (R, C, 2 S, 2 S) of every class."""
        return self.predictor(self.upsampled(x))

    def upsampled(self, x: Tensor) -> Tensor:
        """The feature that masks are predicted from."""
        for name, layer in self.named_children():
            if name.startswith("mask_fcn"):
                x = layer(x)
        return F.relu_(self.deconv(self.attention(x)))

    def class_logits(self, x: Tensor, classes: Tensor) -> Tensor:
        """Like ``layers``, but for one class (R,) each: (R, 2 S, 2 S).

        Logits of other classes are not computed; with many classes they would take most memory.
        """
        x = self.upsampled(x)
        if self.predictor.out_channels == 1:  # class-agnostic masks
            return self.predictor(x)[:, 0]
        weight = self.predictor.weight.flatten(1)[classes]
        logits = torch.einsum("nchw,nc->nhw", x, weight)
        return logits + self.predictor.bias[classes][:, None, None]
