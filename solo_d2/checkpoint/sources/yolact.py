"""The authors' YOLACT and YOLACT++."""

import re

from .source import COUNTERS, Rule, Source, moved
from .torchvision import TORCHVISION_RESNET

# torchvision's names, except for "layers.0" instead of "layer1" and the offsets of YOLACT++.
_RESNET: tuple[Rule, ...] = (
    *(
        (
            rf"layers\.{k}\.(\d+)\.conv2\.conv_offset_mask\.(\w+)",
            rf"res{k + 2}.\1.conv2_offset.\2",
        )
        for k in range(4)
    ),
    *(
        (re.sub(r"^layer(\d)", lambda match: rf"layers\.{int(match[1]) - 1}", pattern), ours)
        for pattern, ours in TORCHVISION_RESNET
    ),
)

# A stage is a convolution followed by blocks.
_DARKNET: tuple[Rule, ...] = (
    (r"_preconv\.0\.(\w+)", r"stem.\1"),
    (r"_preconv\.1\.(\w+)", r"stem.norm.\1"),
    *(
        rule
        for k in range(5)
        for rule in (
            (rf"layers\.{k}\.0\.0\.(\w+)", rf"res{k + 1}.0.\1"),
            (rf"layers\.{k}\.0\.1\.(\w+)", rf"res{k + 1}.0.norm.\1"),
            (rf"layers\.{k}\.(\d+)\.conv(\d)\.0\.(\w+)", rf"res{k + 1}.\1.conv\2.\3"),
            (rf"layers\.{k}\.(\d+)\.conv(\d)\.1\.(\w+)", rf"res{k + 1}.\1.conv\2.norm.\3"),
        )
    ),
)

# The lists of the pyramid start at the coarsest level.
_HEADS: tuple[Rule, ...] = (
    *((rf"fpn\.lat_layers\.{i}\.(\w+)", rf"fpn.lateral{5 - i}.\1") for i in range(3)),
    *((rf"fpn\.pred_layers\.{i}\.(\w+)", rf"fpn.output{5 - i}.\1") for i in range(3)),
    *((rf"fpn\.downsample_layers\.{i}\.(\w+)", rf"fpn.downsample{6 + i}.\1") for i in range(2)),
    # the list also contains ReLUs and an upsampling
    *((rf"proto_net\.{n}\.(\w+)", rf"protonet.conv{i}.\1") for i, n in enumerate((0, 2, 4, 8))),
    (r"proto_net\.10\.(\w+)", r"protonet.predictor.\1"),
    (r"prediction_layers\.0\.upfeature\.0\.(\w+)", r"head.shared.\1"),
    (r"prediction_layers\.0\.bbox_layer\.(\w+)", r"head.box_pred.\1"),
    (r"prediction_layers\.0\.conf_layer\.(\w+)", r"head.class_logits.\1"),
    (r"prediction_layers\.0\.mask_layer\.(\w+)", r"head.coefficient_pred.\1"),
    (r"semantic_seg_conv\.(\w+)", r"semantic_pred.\1"),
    *((rf"maskiou_net\.maskiou_net\.{2 * i}\.(\w+)", rf"mask_iou_head.conv{i}.\1")
      for i in range(5)),
    (r"maskiou_net\.maskiou_net\.10\.(\w+)", r"mask_iou_head.predictor.\1"),
)  # fmt: skip

_DROPPED = (
    COUNTERS,
    # old files have a second name for each backbone tensor, and levels that are never used
    r"backbone\.layer(?!s\.).*",
    r"fpn\.downsample_layers\.(?![01]\.).*",
)

SOURCES = (
    Source(
        name="yolact",
        signature=r"backbone\.layers\.0\.0\.conv1\.",
        rules=(*moved("backbone.", "backbone.", _RESNET), *_HEADS),
        dropped=_DROPPED,
        architecture="YOLACT",
        settings={
            "INPUT.FORMAT": "RGB",
            "MODEL.PIXEL_MEAN": [123.68, 116.78, 103.94],
            "MODEL.PIXEL_STD": [58.40, 57.12, 57.38],
            "MODEL.RESNETS.STRIDE_IN_1X1": False,
        },
    ),
    Source(
        name="yolact_darknet53",
        signature=r"backbone\._preconv\.",
        rules=(*moved("backbone.", "backbone.", _DARKNET), *_HEADS),
        dropped=_DROPPED,
        architecture="YOLACT",
        settings={
            "INPUT.FORMAT": "RGB",
            "MODEL.PIXEL_MEAN": [0.0, 0.0, 0.0],
            "MODEL.PIXEL_STD": [255.0, 255.0, 255.0],
        },
    ),
    Source(
        name="yolact_darknet53_backbone",
        signature=r"_preconv\.",
        rules=_DARKNET,
        dropped=(COUNTERS,),
    ),
)
