"""The authors' SOLO, Decoupled SOLO and SOLOv2, and AdelaiDet's SOLOv2."""

from .source import COUNTERS, Rule, Source, moved
from .torchvision import TORCHVISION_RESNET

# ---- mmdetection v1, on which the authors' code is built

_MMDET_BACKBONE: tuple[Rule, ...] = (
    *moved("backbone.", "backbone.bottom_up.", TORCHVISION_RESNET),
    *(
        (rf"neck\.{theirs}\.{i}\.conv\.(\w+)", rf"backbone.{ours}{i + 2}.\1")
        for theirs, ours in (("lateral_convs", "fpn_lateral"), ("fpn_convs", "fpn_output"))
        for i in range(4)
    ),
)


def _mmdet_convs(source: str, target: str) -> tuple[Rule, ...]:
    """Rules for a ConvModule, which may be deformable; ``source`` is a pattern."""
    name = r"(?P<name>weight|bias)"
    return (
        (rf"{source}\.conv(?:\.conv)?_offset\.{name}", rf"{target}.offset.\g<name>"),
        (rf"{source}\.conv\.{name}", rf"{target}.\g<name>"),
        (rf"{source}\.gn\.{name}", rf"{target}.norm.\g<name>"),
    )


_OFFICIAL_SOLOV2: tuple[Rule, ...] = (
    *_MMDET_BACKBONE,
    *_mmdet_convs(r"bbox_head\.cate_convs\.(\d+)", r"head.category_tower.\1"),
    *_mmdet_convs(r"bbox_head\.kernel_convs\.(\d+)", r"head.kernel_tower.\1"),
    (r"bbox_head\.solo_cate\.(\w+)", r"head.category_pred.\1"),
    (r"bbox_head\.solo_kernel\.(\w+)", r"head.kernel_pred.\1"),
    *_mmdet_convs(r"mask_feat_head\.convs_all_levels\.(\d)\.conv(\d)", r"mask_branch.levels.\1.\2"),
    *_mmdet_convs(r"mask_feat_head\.conv_pred\.0", "mask_branch.output"),
)

_OFFICIAL_SOLO: tuple[Rule, ...] = (
    *_MMDET_BACKBONE,
    *_mmdet_convs(r"bbox_head\.cate_convs\.(\d+)", r"head.category_tower.\1"),
    *_mmdet_convs(r"bbox_head\.ins_convs\.(\d+)", r"head.mask_tower.\1"),
    (r"bbox_head\.solo_cate\.(\w+)", r"head.category_pred.\1"),
    (r"bbox_head\.solo_ins_list\.(\d)\.(\w+)", r"head.mask_pred.\1.\2"),
)

# The light version has one tower for both axes, ins_convs.
_OFFICIAL_DECOUPLED_SOLO: tuple[Rule, ...] = (
    *_MMDET_BACKBONE,
    *_mmdet_convs(r"bbox_head\.cate_convs\.(\d+)", r"head.category_tower.\1"),
    *_mmdet_convs(r"bbox_head\.ins_convs\.(\d+)", r"head.mask_tower.\1"),
    *_mmdet_convs(r"bbox_head\.ins_convs_([xy])\.(\d+)", r"head.\1_tower.\2"),
    (r"bbox_head\.dsolo_cate\.(\w+)", r"head.category_pred.\1"),
    (r"bbox_head\.dsolo_ins_list_([xy])\.(\d)\.(\w+)", r"head.\1_pred.\2.\3"),
)
_OFFICIAL_SETTINGS = {
    "INPUT.FORMAT": "RGB",
    "MODEL.PIXEL_MEAN": [123.675, 116.28, 103.53],
    "MODEL.PIXEL_STD": [58.395, 57.12, 57.375],
    "MODEL.RESNETS.STRIDE_IN_1X1": False,
}

# ---- AdelaiDet, on Detectron2 like ours. Its towers are flat lists of conv, norm, ReLU.

_ADELAIDET_SOLOV2: tuple[Rule, ...] = (
    (r"backbone\.(bottom_up|fpn_lateral\d|fpn_output\d)\.(.+)", r"backbone.\1.\2"),
    *(
        rule
        for theirs, ours in (("cate", "category"), ("kernel", "kernel"))
        for i in range(16)
        for rule in (
            (rf"ins_head\.{theirs}_tower\.{3 * i}\.(\w+)", rf"head.{ours}_tower.{i}.\1"),
            (rf"ins_head\.{theirs}_tower\.{3 * i + 1}\.(\w+)", rf"head.{ours}_tower.{i}.norm.\1"),
        )
    ),
    (r"ins_head\.cate_pred\.(\w+)", r"head.category_pred.\1"),
    (r"ins_head\.kernel_pred\.(\w+)", r"head.kernel_pred.\1"),
    (r"mask_head\.convs_all_levels\.(\d)\.conv(\d)\.0\.(\w+)", r"mask_branch.levels.\1.\2.\3"),
    (r"mask_head\.convs_all_levels\.(\d)\.conv(\d)\.1\.(\w+)", r"mask_branch.levels.\1.\2.norm.\3"),
    (r"mask_head\.conv_pred\.0\.(\w+)", r"mask_branch.output.\1"),
    (r"mask_head\.conv_pred\.1\.(\w+)", r"mask_branch.output.norm.\1"),
)
_ADELAIDET_SETTINGS = {
    "INPUT.FORMAT": "BGR",
    "MODEL.PIXEL_MEAN": [103.53, 116.28, 123.675],
    "MODEL.PIXEL_STD": [1.0, 1.0, 1.0],
    "MODEL.RESNETS.STRIDE_IN_1X1": True,
}

SOURCES = (
    Source(
        name="adelaidet_solov2",
        signature=r"ins_head\.|mask_head\.convs_all_levels\.",
        rules=_ADELAIDET_SOLOV2,
        dropped=(COUNTERS, "pixel_mean", "pixel_std"),
        architecture="SOLOv2",
        settings=_ADELAIDET_SETTINGS,
    ),
    Source(
        name="official_solov2",
        signature=r"mask_feat_head\.|bbox_head\.(kernel_convs|solo_kernel)\.",
        rules=_OFFICIAL_SOLOV2,
        dropped=(COUNTERS,),
        architecture="SOLOv2",
        settings=_OFFICIAL_SETTINGS,
    ),
    Source(
        name="official_solo",
        signature=r"bbox_head\.solo_ins_list\.",
        rules=_OFFICIAL_SOLO,
        dropped=(COUNTERS,),
        architecture="SOLO",
        settings=_OFFICIAL_SETTINGS,
    ),
    Source(
        name="official_decoupled_solo",
        signature=r"bbox_head\.dsolo_",
        rules=_OFFICIAL_DECOUPLED_SOLO,
        dropped=(COUNTERS,),
        architecture="DecoupledSOLO",
        settings=_OFFICIAL_SETTINGS,
    ),
)
