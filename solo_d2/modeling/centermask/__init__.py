from .fcos import FCOSProposalGenerator
from .mask_head import SpatialAttentionMaskHead
from .roi_heads import CenterMaskROIHeads

__all__ = ["CenterMaskROIHeads", "FCOSProposalGenerator", "SpatialAttentionMaskHead"]
