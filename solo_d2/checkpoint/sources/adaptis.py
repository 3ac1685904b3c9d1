"""The authors' AdaptIS: its PyTorch branch, which has only the toy models."""

from .source import COUNTERS, Rule, Source

_TENSOR = r"(weight|bias|running_mean|running_var)"


def _convs(theirs: str, ours: str, numbers: range) -> tuple[Rule, ...]:
    """Rules for a flat list of convolution, ReLU and norm.

    Args:
        theirs, ours: pattern and template of the names of the two lists.
        numbers: indices of the convolutions in our list.
    """
    return tuple(
        rule
        for i, k in enumerate(numbers)
        for rule in (
            (rf"{theirs}\.{3 * i}\.(weight|bias)", rf"{ours}.{k}.\1"),
            (rf"{theirs}\.{3 * i + 2}\.{_TENSOR}", rf"{ours}.{k}.norm.\1"),
        )
    )


_UNET: tuple[Rule, ...] = (
    (rf"backbone\.image_bn\.{_TENSOR}", r"backbone.input_norm.\1"),
    (r"backbone\.decoder\.(\d)\.upsampler\.0\.weight", r"backbone.decoder.\1.upsample.weight"),
    *(
        rule
        for theirs, ours in (
            (r"encoder\.(?P<i>\d)\.1\.down_block\.(?P<k>\d)", r"encoder.\g<i>.\g<k>"),
            (r"decoder\.(?P<i>\d)\.conv3_(?P<k>\d)", r"decoder.\g<i>.conv\g<k>"),
            (r"final_block\.down_block\.(?P<k>\d)", r"final.\g<k>"),
        )
        for rule in (
            (rf"backbone\.{theirs}\.conv_block\.0\.weight", rf"backbone.{ours}.weight"),
            (
                rf"backbone\.{theirs}\.conv_block\.2\.(?P<t>\w+)",
                rf"backbone.{ours}.norm.\g<t>",
            ),
        )
    ),
)

_HEADS: tuple[Rule, ...] = (
    *_convs(r"adaptis_head\.controller\.controller", "controller.layers", range(3)),
    *_convs(r"adaptis_head\.block0", "selection_head.convs", range(3)),
    (r"adaptis_head\.adain\.affine_(scale|bias)\.(\w+)", r"selection_head.adain.0.\1.\2"),
    *_convs(r"adaptis_head\.block1", "selection_head.convs", range(3, 4)),
    (r"adaptis_head\.block1\.3\.(\w+)", r"selection_head.predictor.\1"),
    *_convs(r"segmentation_head\.convhead", "semantic_head.convs", range(3)),
    (r"segmentation_head\.convhead\.9\.(\w+)", r"semantic_head.predictor.\1"),
    # files of the first stage have no proposal head
    *_convs(r"proposals_head\.convhead", "proposal_head.convs", range(2)),
    (r"proposals_head\.convhead\.6\.(\w+)", r"proposal_head.predictor.\1"),
)

SOURCES = (
    Source(
        name="official_adaptis",
        signature=r"adaptis_head\.controller\.",
        rules=(*_UNET, *_HEADS),
        dropped=(COUNTERS,),
        # the adaptive threshold of proposal targets
        lacking=(r"iou_threshold\.value",),
        architecture="AdaptIS",
        settings={
            "INPUT.FORMAT": "RGB",
            "MODEL.PIXEL_MEAN": [127.5, 127.5, 127.5],
            "MODEL.PIXEL_STD": [127.5, 127.5, 127.5],
        },
    ),
)
