"""torchvision's ImageNet weights, renamed for our bottom-up backbones."""

from .source import COUNTERS, Rule, Source

TORCHVISION_RESNET: tuple[Rule, ...] = (
    (r"conv1\.(\w+)", r"stem.conv1.\1"),
    (r"bn1\.(\w+)", r"stem.conv1.norm.\1"),
    *(
        rule
        for k in range(1, 5)
        for rule in (
            # deformable convolutions of mmdetection; its oldest files have "conv2_offset"
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

# features.18 only serves the classifier; our backbone ends before it.
_MOBILENETV2_DROPPED = (r"features\.18\..*", r"classifier\..*", COUNTERS)

# Before torchvision 0.3, and in CenterMask2, the layers of a block are one flat list that includes
# the ReLUs. The first block has no expansion.
OLD_MOBILENETV2: tuple[Rule, ...] = (
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

SOURCES = (
    Source(
        name="torchvision_resnet",
        signature=r"layer1\.0\.conv1\.",
        rules=TORCHVISION_RESNET,
        dropped=(r"fc\.(weight|bias)", COUNTERS),
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
        rules=OLD_MOBILENETV2,
        dropped=_MOBILENETV2_DROPPED,
    ),
)
