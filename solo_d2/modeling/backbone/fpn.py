"""The feature pyramid over the bottom-up backbones of this package."""

from detectron2.modeling import FPN, Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool


def build_fpn(cfg, bottom_up: Backbone) -> FPN:
    """P2 to P6 from ``cfg.MODEL.FPN``; P6 is every second pixel of P5."""
    return FPN(
        bottom_up=bottom_up,
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=LastLevelMaxPool(),
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )
