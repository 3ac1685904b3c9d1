"""How other projects name their tensors, and our names for the same.

One ``Source`` per layout, made of tables. A rule is a pattern for the whole name and the template
of ours; the first that matches counts. A name without a rule is an error, never a guess.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from solo_d2.errors import UserError

Rule = tuple[str, str]
Value = TypeVar("Value")


class Source(NamedTuple):
    """A layout of tensor names."""

    name: str
    # Pattern for the beginning of those names that no other layout has.
    signature: str
    rules: Sequence[Rule]
    # Patterns of whole names that have no place in our models.
    dropped: Sequence[str] = ()
    # Meta-architecture; None for the weights of a backbone alone.
    architecture: str | None = None
    # Config keys that the weights need and that their shapes cannot tell.
    settings: Mapping[str, Any] = {}


def recognise(names: Iterable[str]) -> Source | None:
    """The layout that some of the names are typical for; None if there is none."""
    names = list(names)
    for source in SOURCES.values():
        if any(re.match(source.signature, name) for name in names):
            return source
    return None


def find_new_name(name: str, rules: Sequence[Rule]) -> str | None:
    """Our name for ``name``; None where no rule is for it."""
    for pattern, template in rules:
        match = re.fullmatch(pattern, name)
        if match:
            return match.expand(template)
    return None


def rename_key(name: str, rules: Sequence[Rule]) -> str:
    """Our name for ``name``.

    Raises:
        ValueError: no rule is for it.
    """
    renamed = find_new_name(name, rules)
    if renamed is None:
        raise ValueError(f"no rule renames {name}")
    return renamed


def is_dropped(name: str, source: Source) -> bool:
    """Whether the layout's table says that our models have no place for this tensor."""
    return any(re.fullmatch(pattern, name) for pattern in source.dropped)


def convert(state_dict: Mapping[str, Value], source: Source | None = None) -> dict[str, Value]:
    """The same tensors under our names, without those that are dropped by rule.

    Args:
        state_dict: name -> tensor.
        source: their layout; None recognises it.

    Raises:
        UserError: the layout is not known, no rule is for a name, or two get the same.
    """
    source = source or recognise(state_dict)
    if source is None:
        raise UserError(f"the names are of none of the layouts {', '.join(SOURCES)}")
    origin: dict[str, str] = {}
    unused = []
    for name in state_dict:
        if is_dropped(name, source):
            continue
        renamed = find_new_name(name, source.rules)
        if renamed is None:
            unused.append(name)
        elif renamed in origin:
            raise UserError(f"both {origin[renamed]} and {name} are named {renamed} here")
        else:
            origin[renamed] = name
    if unused:
        raise UserError(f"unused, the layout {source.name} has no such names: {', '.join(unused)}")
    return {renamed: state_dict[name] for renamed, name in origin.items()}


def _moved(source: str, target: str, rules: Sequence[Rule]) -> tuple[Rule, ...]:
    """The same rules for names that begin with ``source``; ours then begin with ``target``."""
    return tuple((re.escape(source) + pattern, target + to) for pattern, to in rules)


_COUNTERS = r".*\.num_batches_tracked"

# ---- ImageNet weights of torchvision, named as in a bottom-up of ours

_TORCHVISION_RESNET: tuple[Rule, ...] = (
    (r"conv1\.(\w+)", r"stem.conv1.\1"),
    (r"bn1\.(\w+)", r"stem.conv1.norm.\1"),
    *(
        rule
        for k in range(1, 5)
        for rule in (
            # not torchvision's, but mmdetection's: deformable; "conv2_offset" in its oldest files
            (
                rf"layer{k}\.(\d+)\.conv2(?:\.conv)?_offset\.(\w+)",
                rf"res{k + 1}.\1.conv2_offset.\2",
            ),
            (rf"layer{k}\.(\d+)\.conv(\d)\.(\w+)", rf"res{k + 1}.\1.conv\2.\3"),
            (rf"layer{k}\.(\d+)\.bn(\d)\.(\w+)", rf"res{k + 1}.\1.conv\2.norm.\3"),
            (rf"layer{k}\.(\d+)\.downsample\.0\.(\w+)", rf"res{k + 1}.\1.shortcut.\2"),
            (rf"layer{k}\.(\d+)\.downsample\.1\.(\w+)", rf"res{k + 1}.\1.shortcut.norm.\2"),
        )
    ),
)

# The 1280 channels of features.18 are made for the classifier; our backbone ends before them.
_MOBILENETV2_DROPPED = (r"features\.18\..*", r"classifier\..*", _COUNTERS)

# Before torchvision 0.3 the layers of a block were one flat list with the ReLUs in it. The first
# block has no expansion.
_OLD_MOBILENETV2: tuple[Rule, ...] = (
    (r"features\.(0|18)\.(\d)\.(\w+)", r"features.\1.\2.\3"),
    *(
        (rf"features\.1\.conv\.{old}\.(\w+)", rf"features.1.conv.{new}.\1")
        for old, new in {"0": "0.0", "1": "0.1", "3": "1", "4": "2"}.items()
    ),
    *(
        (rf"features\.(\d+)\.conv\.{old}\.(\w+)", rf"features.\1.conv.{new}.\2")
        for old, new in {
            "0": "0.0", "1": "0.1", "3": "1.0", "4": "1.1", "6": "2", "7": "3"
        }.items()
    ),
)  # fmt: skip

# ---- mmdetection v1, on which the authors' code is built

_MMDET_BACKBONE: tuple[Rule, ...] = (
    *_moved("backbone.", "backbone.bottom_up.", _TORCHVISION_RESNET),
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

SOURCES = {
    source.name: source
    for source in (
        Source(
            name="adelaidet_solov2",
            signature=r"ins_head\.|mask_head\.convs_all_levels\.",
            rules=_ADELAIDET_SOLOV2,
            dropped=(_COUNTERS, "pixel_mean", "pixel_std"),
            architecture="SOLOv2",
            settings=_ADELAIDET_SETTINGS,
        ),
        Source(
            name="official_solov2",
            signature=r"mask_feat_head\.|bbox_head\.(kernel_convs|solo_kernel)\.",
            rules=_OFFICIAL_SOLOV2,
            dropped=(_COUNTERS,),
            architecture="SOLOv2",
            settings=_OFFICIAL_SETTINGS,
        ),
        Source(
            name="official_solo",
            signature=r"bbox_head\.solo_ins_list\.",
            rules=_OFFICIAL_SOLO,
            dropped=(_COUNTERS,),
            architecture="SOLO",
            settings=_OFFICIAL_SETTINGS,
        ),
        Source(
            name="official_decoupled_solo",
            signature=r"bbox_head\.dsolo_",
            rules=_OFFICIAL_DECOUPLED_SOLO,
            dropped=(_COUNTERS,),
            architecture="DecoupledSOLO",
            settings=_OFFICIAL_SETTINGS,
        ),
        Source(
            name="torchvision_resnet",
            signature=r"layer1\.0\.conv1\.",
            rules=_TORCHVISION_RESNET,
            dropped=(r"fc\.(weight|bias)", _COUNTERS),
        ),
        Source(
            name="torchvision_mobilenetv2",
            signature=r"features\.1\.conv\.0\.0\.",
            rules=((r"(features\..+)", r"\1"),),
            dropped=_MOBILENETV2_DROPPED,
        ),
        Source(
            name="torchvision_mobilenetv2_old",
            signature=r"features\.1\.conv\.0\.weight",
            rules=_OLD_MOBILENETV2,
            dropped=_MOBILENETV2_DROPPED,
        ),
    )
}
