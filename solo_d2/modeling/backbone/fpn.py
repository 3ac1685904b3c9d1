"""The feature pyramids on top of this package's bottom-up backbones."""

import math
import re
from collections.abc import Callable

from detectron2.modeling import FPN, Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from fvcore.nn import weight_init
from torch import Tensor, nn
from torch.nn import functional as F


def build_fpn(cfg, bottom_up: Backbone) -> FPN:
    """P2 to P6 from ``cfg.MODEL.FPN``; P6 is every second pixel of P5.

    Raises:
        ValueError: MODEL.FPN.IN_FEATURES has an unsupported value.
    """
    features = cfg.MODEL.FPN.IN_FEATURES
    shapes = bottom_up.output_shape()
    if features and features[-1] in shapes and shapes[features[-1]].stride != 32:
        raise ValueError(
            "MODEL.FPN.IN_FEATURES must end with the feature of stride 32, which P5 and P6 are "
            f"made from, not with {features[-1]!r}"
        )
    return _build(cfg, bottom_up, lambda last_level: LastLevelMaxPool())


def build_fcos_fpn(cfg, bottom_up: Backbone) -> FPN:
    """FCOS's pyramid, P3 to P7: P6 from P5, P7 from P6, up to the coarsest level that is used.

    Raises:
        ValueError: MODEL.FPN.IN_FEATURES has an unsupported value.
    """
    used = [*cfg.MODEL.FCOS.IN_FEATURES]
    if cfg.MODEL.MASK_ON:
        used += cfg.MODEL.ROI_HEADS.IN_FEATURES
    # names of other forms are reported as missing where they are used
    coarsest = max((int(name[1:]) for name in used if re.fullmatch(r"p\d", name)), default=0)
    channels = cfg.MODEL.FPN.OUT_CHANNELS

    def top_block(last_level: int) -> nn.Module | None:
        if coarsest <= last_level:
            return None
        return StridedTopBlock(channels, last_level=last_level, num_levels=coarsest - last_level)

    return _build(cfg, bottom_up, top_block)


def _build(cfg, bottom_up: Backbone, top_block: Callable[[int], nn.Module | None]) -> FPN:
    """``top_block`` is made from the last level of the pyramid, 5 for P5."""
    shapes, names = bottom_up.output_shape(), cfg.MODEL.FPN.IN_FEATURES
    for name in names:
        if name not in shapes:
            raise ValueError(
                f"MODEL.FPN.IN_FEATURES has {name!r}, but the backbone's outputs are {[*shapes]}"
            )
    strides = [shapes[name].stride for name in names]
    if not names or strides != [strides[0] * 2**i for i in range(len(strides))]:
        raise ValueError(
            f"MODEL.FPN.IN_FEATURES must have strides that double, but {[*names]} have {strides}"
        )
    return FPN(
        bottom_up=bottom_up,
        in_features=names,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=top_block(int(math.log2(shapes[names[-1]].stride))),
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )


class StridedTopBlock(nn.Module):
    """Levels above a pyramid's last output: P6 from P5, P7 from ReLU(P6), and so on.

    Detectron2's ``LastLevelP6P7`` always has two. The convolutions have the names of the levels.
    """

    def __init__(self, channels: int, *, last_level: int, num_levels: int):
        """
        Args:
            channels: channels of all levels.
            last_level: coarsest level of the pyramid without this block: 5 for P5.
            num_levels: number of levels above it.
        """
        super().__init__()
        self.in_feature = f"p{last_level}"
        self.num_levels = num_levels
        for level in range(last_level + 1, last_level + 1 + num_levels):
            conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
            weight_init.c2_xavier_fill(conv)
            self.add_module(f"p{level}", conv)

    def forward(self, x: Tensor) -> list[Tensor]:
        """(N, C, H, W) -> per level a map with half the size of the previous one, rounded up."""
        outputs: list[Tensor] = []
        for conv in self.children():
            outputs.append(conv(F.relu(outputs[-1]) if outputs else x))
        return outputs
