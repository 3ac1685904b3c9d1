"""MobileNetV2 (arXiv 1801.04381) of torchvision as a bottom-up backbone."""

from typing import Any

from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import Backbone
from torch import Tensor
from torchvision.models import mobilenet_v2

from ..options import check_choice
from .registry import check_stages, freeze, register_backbone, register_pyramids

# Last block of each stride. The final 1x1 conv to 1280 channels belongs to the classifier and is
# left out: it would quadruple the width of the coarsest lateral connection.
_STAGES = {"res2": 3, "res3": 6, "res4": 13, "res5": 17}


class MobileNetV2(Backbone):
    """torchvision's feature extractor up to its last inverted residual, with four outputs.

    Parameter names are torchvision's: ``features.<block>...``.
    """

    def __init__(
        self,
        *,
        out_features: list[str],
        width_mult: float = 1.0,
        norm: str = "FrozenBN",
        freeze_at: int = 2,
    ):
        """
        Args:
            out_features: some of "res2" to "res5", at strides 4 to 32.
            width_mult: factor on all widths.
            norm: "FrozenBN" or "BN".
            freeze_at: freeze the stem (1), and the stages up to "res<freeze_at>"; 0 freezes none.

        Raises:
            ValueError: an option has an unsupported value.
        """
        super().__init__()
        check_stages(out_features, [*_STAGES], freeze_at)
        check_choice("norm", norm, ("FrozenBN", "BN"))
        blocks = mobilenet_v2(weights=None, width_mult=width_mult).features
        self.features = blocks[: max(_STAGES[name] for name in out_features) + 1]
        self._out_features = list(out_features)
        self._out_feature_channels = {n: blocks[_STAGES[n]].out_channels for n in out_features}
        self._out_feature_strides = {name: 2 ** int(name[-1]) for name in out_features}
        if norm == "FrozenBN":
            FrozenBatchNorm2d.convert_frozen_batchnorm(self.features)
        frozen = 0
        if freeze_at > 0:
            frozen = 1 + max([_STAGES[f"res{i}"] for i in range(2, freeze_at + 1)], default=0)
        freeze(self.features[:frozen])

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # Detectron2's checkpointer would continue with random weights: torchvision's names do not
        # start with "backbone.bottom_up.", so no tensor of its file reaches this module.
        if not any(name.startswith(prefix) for name in state_dict):
            raise ValueError(
                f"the file has no weights for MobileNetV2 ({prefix}features...); a file of "
                "torchvision is loaded by solo_d2.checkpoint.Checkpointer(model).load(path)"
            )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(N, 3, H, W) -> a map (N, C, H / stride, W / stride) per output."""
        names = {_STAGES[name]: name for name in self._out_features}
        outputs = {}
        for i, block in enumerate(self.features):
            x = block(x)
            if i in names:
                outputs[names[i]] = x
        return outputs


@register_backbone
def build_mobilenetv2_backbone(cfg, input_shape: ShapeSpec) -> MobileNetV2:
    """MobileNetV2 from ``cfg.MODEL.MOBILENETV2`` and ``cfg.MODEL.BACKBONE.FREEZE_AT``."""
    options = cfg.MODEL.MOBILENETV2
    return MobileNetV2(
        out_features=options.OUT_FEATURES,
        width_mult=options.WIDTH_MULT,
        norm=options.NORM,
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
    )


register_pyramids(
    build_mobilenetv2_backbone,
    fpn="build_mobilenetv2_fpn_backbone",
    fcos_fpn="build_fcos_mobilenetv2_fpn_backbone",
)
