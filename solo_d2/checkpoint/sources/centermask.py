"""CenterMask2 and the same authors' VoVNetV2, both based on Detectron2."""

from .source import COUNTERS, Rule, Source, moved
from .torchvision import OLD_MOBILENETV2

# A layer's name repeats the names of its stage and module, and contains a slash.
_PLACES = (
    (r"stem\.stem_(?P<i>\d)", r"stem.conv\g<i>"),
    *(
        (
            rf"stage(?P<k>\d)\.OSA(?P=k)_(?P<b>\d+)\.{theirs}",
            rf"stage\g<k>.osa\g<b>.{ours}",
        )
        for theirs, ours in (
            (r"layers\.(?P<i>\d+)\.OSA(?P=k)_(?P=b)_(?P=i)", r"layers.\g<i>"),
            (r"conv_reduction\.OSA(?P=k)_(?P=b)_reduction_0", "reduction"),
            (r"concat\.OSA(?P=k)_(?P=b)_concat", "concat"),
        )
    ),
)
_LAYER = {
    "conv": "",
    "norm": "norm.",
    "conv_offset": "offset.",
    "dw_conv3x3": "depthwise.",
    "pw_conv1x1": "pointwise.",
    "pw_norm": "pointwise.norm.",
}
_VOVNET: tuple[Rule, ...] = (
    *(
        (rf"{place}/{theirs}\.(?P<t>\w+)", rf"{our_place}.{ours}\g<t>")
        for place, our_place in _PLACES
        for theirs, ours in _LAYER.items()
    ),
    (r"stage(\d)\.OSA\1_(\d+)\.ese\.fc\.(\w+)", r"stage\1.osa\2.ese.fc.\3"),
)

_HEAD = r"proposal_generator\.fcos_head"


def _tower(theirs: str, ours: str) -> tuple[Rule, ...]:
    """Rules for a flat list of convolution, norm and ReLU."""
    theirs, ours = rf"{_HEAD}\.{theirs}", f"proposal_generator.head.{ours}"
    return tuple(
        rule
        for i in range(8)
        for rule in (
            (rf"{theirs}\.{3 * i}\.(\w+)", rf"{ours}.{i}.\1"),
            (rf"{theirs}\.{3 * i + 1}\.(\w+)", rf"{ours}.{i}.norm.\1"),
        )
    )


_CENTERMASK: tuple[Rule, ...] = (
    *moved("backbone.bottom_up.", "backbone.bottom_up.", _VOVNET),
    *moved("backbone.bottom_up.", "backbone.bottom_up.", OLD_MOBILENETV2),
    # Detectron2's ResNet, its pyramid and the top block
    (r"backbone\.(bottom_up\.(?:stem|res\d)\.[\w.]+)", r"backbone.\1"),
    (r"backbone\.((?:fpn_(?:lateral|output)\d|top_block\.p\d)\.\w+)", r"backbone.\1"),
    *_tower("share_tower", "share_tower"),
    *_tower("cls_tower", "class_tower"),
    *_tower("bbox_tower", "box_tower"),
    (rf"{_HEAD}\.cls_logits\.(\w+)", r"proposal_generator.head.class_logits.\1"),
    (rf"{_HEAD}\.bbox_pred\.(\w+)", r"proposal_generator.head.box_pred.\1"),
    (rf"{_HEAD}\.ctrness\.(\w+)", r"proposal_generator.head.centerness.\1"),
    (rf"{_HEAD}\.scales", "proposal_generator.head.scales"),
    (r"roi_heads\.mask_head\.((?:mask_fcn\d|deconv|predictor)\..+)", r"roi_heads.mask_head.\1"),
    (
        r"roi_heads\.mask_head\.spatialAtt\.conv\.weight",
        "roi_heads.mask_head.attention.conv.weight",
    ),
    (r"roi_heads\.maskiou_head\.maskiou_fcn(\d)\.(\w+)", r"roi_heads.mask_iou_head.conv\1.\2"),
    (r"roi_heads\.maskiou_head\.maskiou_fc(\d)\.(\w+)", r"roi_heads.mask_iou_head.fc\1.\2"),
    (r"roi_heads\.maskiou_head\.maskiou\.(\w+)", r"roi_heads.mask_iou_head.predictor.\1"),
    # Detectron2's semantic branch
    (r"sem_seg_head\.((?:p\d\.\d|predictor)\..+)", r"sem_seg_head.\1"),
)

_CENTERMASK2 = Source(
    name="centermask2",
    signature=r"proposal_generator\.fcos_head\.",
    rules=_CENTERMASK,
    joined=((rf"({_HEAD}\.scales)\.\d+\.scale", r"\1"),),
    # files of older Detectron2 versions have the pixel statistics
    dropped=(COUNTERS, "pixel_mean", "pixel_std"),
    architecture="GeneralizedRCNN",
    settings={"INPUT.FORMAT": "BGR", "MODEL.PIXEL_MEAN": [103.53, 116.28, 123.675]},
)

SOURCES = (
    _CENTERMASK2._replace(
        name="centermask2_panoptic", also_has=r"sem_seg_head\.", architecture="PanopticFPN"
    ),
    _CENTERMASK2,
    # ImageNet weights. Other detectors of the same authors use these names for the backbone and
    # Detectron2's names for the rest.
    Source(
        name="vovnet",
        signature=r"(backbone\.bottom_up\.)?stem\.stem_1/",
        rules=(*moved("backbone.bottom_up.", "", _VOVNET), *_VOVNET),
        dropped=(COUNTERS, r"(backbone\.bottom_up\.)?(classifier|fc|head|linear)\.(weight|bias)"),
    ),
)
