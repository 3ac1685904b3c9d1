"""The authors' EPS: a ResNet-38 and its classifier."""

from .source import COUNTERS, Rule, Source

# layer of a block -> ours
_LAYERS: tuple[Rule, ...] = (
    (r"bn_branch2a\.(?P<t>\w+)", r"norms.0.\g<t>"),
    (r"bn_branch2b(?P<i>\d)\.(?P<t>\w+)", r"norms.\g<i>.\g<t>"),
    (r"conv_branch2a\.(?P<t>\w+)", r"convs.0.\g<t>"),
    (r"conv_branch2b(?P<i>\d)\.(?P<t>\w+)", r"convs.\g<i>.\g<t>"),
    (r"conv_branch1\.(?P<t>\w+)", r"shortcut.\g<t>"),
)

SOURCES = (
    Source(
        name="official_eps",
        signature=r"b2\.bn_branch2a\.",
        rules=(
            (r"conv1a\.(\w+)", r"backbone.stem.\1"),
            # the first block of a stage has no number
            *(
                (block + theirs, ours + layer)
                for block, ours in (
                    (r"b(?P<s>\d)\.", r"backbone.res\g<s>.0."),
                    (r"b(?P<s>\d)_(?P<b>\d)\.", r"backbone.res\g<s>.\g<b>."),
                )
                for theirs, layer in _LAYERS
            ),
            (r"bn7\.(\w+)", r"backbone.norm.\1"),
            (r"fc8\.(\w+)", r"classifier.\1"),
        ),
        dropped=(COUNTERS,),
        architecture="EPS",
        settings={
            "INPUT.FORMAT": "RGB",
            "MODEL.PIXEL_MEAN": [123.675, 116.28, 103.53],
            "MODEL.PIXEL_STD": [58.395, 57.12, 57.375],
            "MODEL.EPS.SALIENCY_LOSS": True,
        },
    ),
)
