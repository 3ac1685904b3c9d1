"""What the shapes of a state dict tell about the config of its model."""

import math
import re
from collections.abc import Mapping
from typing import Any

from solo_d2.errors import UserError
from solo_d2.modeling.backbone.vovnet import BODIES, VoVNetBody

Shapes = Mapping[str, tuple[int, ...]]

# Blocks per stage, and whether they are bottlenecks -> depth.
_RESNET_DEPTHS: dict[tuple[tuple[int, ...], bool], int] = {
    ((2, 2, 2, 2), False): 18,
    ((3, 4, 6, 3), False): 34,
    ((3, 4, 6, 3), True): 50,
    ((3, 4, 23, 3), True): 101,
    ((3, 8, 36, 3), True): 152,
}


def infer_config(architecture: str, shapes: Shapes) -> dict[str, Any]:
    """Config keys and values with which the model has tensors of these names and shapes.

    What leaves no trace in them (strides, scale ranges, image sizes) stays as in the defaults.

    Args:
        architecture: the meta-architecture.
        shapes: of the state dict, under our names.

    Raises:
        UserError: a tensor that is needed for this is missing, or no such model is known.
    """
    infer = _ARCHITECTURES[architecture]
    try:
        return {
            "MODEL.META_ARCHITECTURE": architecture,
            **infer(shapes),
        }
    except KeyError as error:
        raise UserError(f"missing: {error.args[0]}") from None


def _resnet_fpn(shapes: Shapes) -> dict[str, Any]:
    bottom_up = _resnet(shapes, "backbone.bottom_up")
    fpn_norm = ""
    if "backbone.fpn_lateral2.norm.weight" in shapes:
        fpn_norm = "BN" if "backbone.fpn_lateral2.norm.running_mean" in shapes else "GN"
    name = bottom_up["MODEL.BACKBONE.NAME"].removesuffix("_backbone")
    return {
        **bottom_up,
        "MODEL.BACKBONE.NAME": f"{name}_fpn_backbone",
        "MODEL.RESNETS.OUT_FEATURES": ["res2", "res3", "res4", "res5"],
        "MODEL.FPN.IN_FEATURES": ["res2", "res3", "res4", "res5"],
        "MODEL.FPN.OUT_CHANNELS": shapes["backbone.fpn_output2.weight"][0],
        "MODEL.FPN.NORM": fpn_norm,
    }


def _resnet(shapes: Shapes, bottom_up: str) -> dict[str, Any]:
    """A ResNet without a pyramid whose names begin with ``bottom_up``."""
    blocks = tuple(_count(shapes, rf"{bottom_up}\.res{k}\.(\d+)\.") for k in range(2, 6))
    bottleneck = any(
        name.startswith(bottom_up) and name.endswith(".conv3.weight") for name in shapes
    )
    depth = _RESNET_DEPTHS.get((blocks, bottleneck))
    if depth is None:
        raise UserError(
            f"missing: no ResNet has {', '.join(map(str, blocks))} blocks in its stages"
        )
    width, width_per_group = shapes[f"{bottom_up}.res2.0.conv2.weight"][:2]
    out = shapes[f"{bottom_up}.res2.0.conv{3 if bottleneck else 2}.weight"][0]
    # per stage: deformable block -> outputs of its offset convolution
    offsets = [
        {
            int(match[1]): shape[0]
            for name, shape in shapes.items()
            if (match := re.match(rf"{bottom_up}\.res{k}\.(\d+)\.conv2_offset\.bias", name))
        }
        for k in range(2, 6)
    ]
    deformable = [bool(stage) for stage in offsets]
    second = [sorted(stage)[1] for stage in offsets if len(stage) > 1]
    return {
        "MODEL.BACKBONE.NAME": f"build_{'deform_' if any(deformable) else ''}resnet_backbone",
        "MODEL.RESNETS.DEPTH": depth,
        "MODEL.RESNETS.NUM_GROUPS": width // width_per_group,
        "MODEL.RESNETS.WIDTH_PER_GROUP": width_per_group,
        "MODEL.RESNETS.RES2_OUT_CHANNELS": out,
        "MODEL.RESNETS.DEFORM_ON_PER_STAGE": deformable,
        "MODEL.RESNETS.DEFORM_MODULATED": any(27 in stage.values() for stage in offsets),
        "MODEL.RESNETS.DEFORM_INTERVAL": min(second, default=1),
        "MODEL.RESNETS.DEFORM_BIAS": any(
            re.match(rf"{bottom_up}\.res\d\.\d+\.conv2\.bias", name) for name in shapes
        ),
    }


def _solov2(shapes: Shapes) -> dict[str, Any]:
    mask_dim = shapes["mask_branch.output.weight"][0]
    kernel_dim = shapes["head.kernel_pred.bias"][0]
    return {
        **_solo_family(shapes, "kernel"),
        "MODEL.SOLOV2.MASK_DIM": mask_dim,
        "MODEL.SOLOV2.KERNEL_SIZE": math.isqrt(kernel_dim // mask_dim),
        "MODEL.SOLOV2.MASK_CONV_DIM": shapes["mask_branch.output.weight"][1],
        "MODEL.SOLOV2.MASK_DEFORM": "mask_branch.output.offset.weight" in shapes,
    }


def _solo(shapes: Shapes) -> dict[str, Any]:
    grids = [math.isqrt(channels) for channels in _outputs(shapes, "mask_pred")]
    return {**_solo_family(shapes, "mask"), "MODEL.SOLO.NUM_GRIDS": grids}


def _decoupled_solo(shapes: Shapes) -> dict[str, Any]:
    shared = "head.mask_tower.0.weight" in shapes
    return {
        **_solo_family(shapes, "mask" if shared else "x"),
        "MODEL.SOLO.NUM_GRIDS": _outputs(shapes, "x_pred"),
        "MODEL.DECOUPLED_SOLO.SHARED_TOWER": shared,
    }


def _solo_family(shapes: Shapes, tower: str) -> dict[str, Any]:
    """What the towers tell; ``tower`` is the one that gets the coordinates."""
    towers = rf"head\.(?:category|{tower})_tower\.(\d+)\."
    deformable = {int(m[1]) for name in shapes if (m := re.match(towers + r"offset\.", name))}
    offsets = [s for n, s in shapes.items() if re.match(r"(head|mask_branch)\..*\.offset\.bias", n)]
    conv_dim, tower_in = shapes[f"head.{tower}_tower.0.weight"][:2]
    return {
        **_resnet_fpn(shapes),
        "MODEL.SOLO.NUM_CLASSES": shapes["head.category_pred.bias"][0],
        "MODEL.SOLO.NUM_CONVS": _count(shapes, towers),
        "MODEL.SOLO.CONV_DIM": conv_dim,
        "MODEL.SOLO.COORD_CONV": tower_in != shapes["head.category_tower.0.weight"][1],
        "MODEL.SOLO.DEFORM": {0: "none", 1: "last"}.get(len(deformable), "all"),
        # v2 has three outputs per position of a 3x3 or 1x1 kernel, v1 two
        "MODEL.SOLO.DEFORM_MODULATED": any(shape[0] in (27, 3) for shape in offsets),
    }


def _adaptis(shapes: Shapes) -> dict[str, Any]:
    """The toy models, the only ones with published weights: U-Net, one class of stuff."""
    num_stuff = 1
    encoder = [n for n in shapes if re.match(r"backbone\.encoder\.\d+\.0\.weight", n)]
    conv_dim = shapes["selection_head.convs.0.weight"][0]
    settings = {
        "MODEL.BACKBONE.NAME": "build_adaptis_unet_backbone",
        "MODEL.UNET.WIDTH": shapes["backbone.encoder.0.0.weight"][0],
        "MODEL.UNET.LEVELS": len(encoder),
        "MODEL.ADAPTIS.STAGE": "instance",
        "MODEL.ADAPTIS.NUM_STUFF": num_stuff,
        "MODEL.ADAPTIS.NUM_THINGS": shapes["semantic_head.predictor.weight"][0] - num_stuff,
        "MODEL.ADAPTIS.CONV_DIM": conv_dim,
        "MODEL.ADAPTIS.SEMANTIC_DIM": shapes["semantic_head.convs.0.weight"][0],
    }
    if any(name.startswith("proposal_head.") for name in shapes):
        settings["MODEL.ADAPTIS.STAGE"] = "proposals"
        settings["MODEL.ADAPTIS.PROPOSAL_DIM"] = shapes["proposal_head.convs.0.weight"][0]
    return settings


def _centermask(shapes: Shapes) -> dict[str, Any]:
    head = r"proposal_generator\.head\."
    mask_head, iou_head = r"roi_heads\.mask_head\.", r"roi_heads\.mask_iou_head\."
    num_classes = shapes["proposal_generator.head.class_logits.bias"][0]
    settings = {
        **_fcos_pyramid(shapes),
        "MODEL.PROPOSAL_GENERATOR.NAME": "FCOSProposalGenerator",
        "MODEL.FCOS.NUM_CLASSES": num_classes,
        "MODEL.FCOS.NUM_SHARE_CONVS": _count(shapes, rf"{head}share_tower\.(\d+)\."),
        "MODEL.FCOS.NUM_CLS_CONVS": _count(shapes, rf"{head}class_tower\.(\d+)\."),
        "MODEL.FCOS.NUM_BOX_CONVS": _count(shapes, rf"{head}box_tower\.(\d+)\."),
        "MODEL.FCOS.NORM": "GN" if any(re.match(rf"{head}.*\.norm\.", n) for n in shapes) else "",
        "MODEL.FCOS.USE_SCALE": "proposal_generator.head.scales" in shapes,
        "MODEL.ROI_HEADS.NAME": "CenterMaskROIHeads",
        "MODEL.ROI_HEADS.NUM_CLASSES": num_classes,
        "MODEL.MASK_ON": any(re.match(mask_head, name) for name in shapes),
        "MODEL.CENTERMASK.MASK_IOU_ON": any(re.match(iou_head, name) for name in shapes),
    }
    # the convolutions' numbers begin with 1
    if settings["MODEL.MASK_ON"]:
        outputs, conv_dim = shapes["roi_heads.mask_head.predictor.weight"][:2]
        settings |= {
            "MODEL.ROI_MASK_HEAD.NAME": "SpatialAttentionMaskHead",
            "MODEL.ROI_MASK_HEAD.NUM_CONV": _count(shapes, rf"{mask_head}mask_fcn(\d+)\.") - 1,
            "MODEL.ROI_MASK_HEAD.CONV_DIM": conv_dim,
            "MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK": outputs == 1 != num_classes,
        }
    if settings["MODEL.CENTERMASK.MASK_IOU_ON"]:
        conv_dim = shapes["roi_heads.mask_iou_head.conv1.weight"][0]
        settings |= {
            "MODEL.CENTERMASK.MASK_IOU_NUM_CONV": _count(shapes, rf"{iou_head}conv(\d+)\.") - 1,
            "MODEL.CENTERMASK.MASK_IOU_CONV_DIM": conv_dim,
            "MODEL.CENTERMASK.MASK_IOU_FC_DIM": shapes["roi_heads.mask_iou_head.fc1.bias"][0],
        }
    return settings


def _fcos_pyramid(shapes: Shapes) -> dict[str, Any]:
    """The pyramid P3 to P7, or of other levels, over a VoVNet or a ResNet."""
    levels = sorted(
        int(match[1])
        for name in shapes
        if (match := re.fullmatch(r"backbone\.fpn_output(\d)\.weight", name))
    )
    if not levels:
        raise UserError("missing: backbone.fpn_output5.weight")
    top_levels = max(0, _count(shapes, r"backbone\.top_block\.p(\d)\.") - 1 - levels[-1])
    if any(name.startswith("backbone.bottom_up.stage2.") for name in shapes):
        bottom_up, key, stage = _vovnet(shapes, "backbone.bottom_up"), "VOVNET", "stage"
    else:
        bottom_up, key, stage = _resnet(shapes, "backbone.bottom_up"), "RESNETS", "res"
        if bottom_up["MODEL.RESNETS.NUM_GROUPS"] > 1:  # Detectron2's X-101 32x8d
            bottom_up["MODEL.RESNETS.STRIDE_IN_1X1"] = False
            bottom_up["MODEL.PIXEL_STD"] = [57.375, 57.12, 58.395]
    body = "vovnet" if key == "VOVNET" else "resnet"
    in_features = [f"{stage}{level}" for level in levels]
    return {
        **bottom_up,
        "MODEL.BACKBONE.NAME": f"build_fcos_{body}_fpn_backbone",
        f"MODEL.{key}.OUT_FEATURES": in_features,
        "MODEL.FPN.IN_FEATURES": in_features,
        "MODEL.FPN.OUT_CHANNELS": shapes[f"backbone.fpn_output{levels[-1]}.weight"][0],
        "MODEL.FCOS.IN_FEATURES": [f"p{k}" for k in range(levels[0], levels[-1] + top_levels + 1)],
        "MODEL.FCOS.TOP_LEVELS": top_levels,
        "MODEL.ROI_HEADS.IN_FEATURES": [f"p{level}" for level in levels],
    }


def _vovnet(shapes: Shapes, bottom_up: str) -> dict[str, Any]:
    """A VoVNet without a pyramid whose names begin with ``bottom_up``."""
    first = f"{bottom_up}.stage2.osa1.layers.0"
    depthwise = f"{first}.depthwise.weight" in shapes
    stem = [f"{bottom_up}.stem.conv{i}.weight" for i in (1, 2, 3)]
    stages = [rf"{bottom_up}.stage{k}" for k in range(2, 6)]
    if depthwise:
        stem[1:] = [f"{bottom_up}.stem.conv{i}.pointwise.weight" for i in (2, 3)]
    inner = "layers.0.pointwise.weight" if depthwise else "layers.0.weight"
    body = VoVNetBody(
        stem=tuple(shapes[name][0] for name in stem),
        inner=tuple(shapes[f"{stage}.osa1.{inner}"][0] for stage in stages),
        out=tuple(shapes[f"{stage}.osa1.concat.weight"][0] for stage in stages),
        layers=_count(shapes, rf"{bottom_up}\.stage2\.osa1\.layers\.(\d+)\."),
        modules=tuple(_count(shapes, rf"{stage}\.osa(\d+)\.") - 1 for stage in stages),
        depthwise=depthwise,
    )
    names = [name for name, known in BODIES.items() if known == body]
    if not names:
        raise UserError(f"missing: no VoVNet has {body}")
    offsets = [shapes.get(f"{stage}.osa1.layers.0.offset.bias", (0,))[0] for stage in stages]
    return {
        "MODEL.BACKBONE.FREEZE_AT": 0,
        "MODEL.VOVNET.CONV_BODY": names[0],
        "MODEL.VOVNET.STAGE_WITH_DCN": tuple(outputs > 0 for outputs in offsets),
        "MODEL.VOVNET.WITH_MODULATED_DCN": 27 in offsets,
    }


def _outputs(shapes: Shapes, name: str) -> list[int]:
    """Output channels of a conv of the head, per level."""
    levels = range(_count(shapes, rf"head\.{name}\.(\d+)\."))
    return [shapes[f"head.{name}.{level}.bias"][0] for level in levels]


def _count(shapes: Shapes, pattern: str) -> int:
    """One more than the largest index that ``pattern`` finds; 0 if it finds none."""
    found = [int(match[1]) for name in shapes if (match := re.match(pattern, name))]
    return max(found, default=-1) + 1


def _yolact(shapes: Shapes) -> dict[str, Any]:
    classes = shapes["semantic_pred.bias"][0]
    # each anchor has an output per class and one for the background
    anchors = shapes["head.class_logits.bias"][0] // (classes + 1)
    plus = "mask_iou_head.predictor.bias" in shapes
    if "backbone.stem.weight" in shapes:
        backbone = {
            "MODEL.BACKBONE.NAME": "build_darknet_backbone",
            "MODEL.DARKNET.STEM_OUT_CHANNELS": shapes["backbone.stem.weight"][0],
        }
    else:
        backbone = _resnet(shapes, "backbone")
        backbone["MODEL.RESNETS.OUT_FEATURES"] = ["res3", "res4", "res5"]
    return {
        **backbone,
        "MODEL.YOLACT.NUM_CLASSES": classes,
        "MODEL.YOLACT.CONV_DIM": shapes["fpn.lateral5.weight"][0],
        "MODEL.YOLACT.NUM_PROTOTYPES": shapes["protonet.predictor.bias"][0],
        # of each size there are three, of other aspect ratios
        "MODEL.YOLACT.ANCHORS_PER_OCTAVE": anchors // 3,
        # published for ++; the tensors of both kinds are alike
        "MODEL.YOLACT.SQUARE_ANCHORS": not plus,
        "MODEL.YOLACT.MASK_IOU.ENABLED": plus,
    }


_ARCHITECTURES = {
    "SOLOv2": _solov2,
    "SOLO": _solo,
    "DecoupledSOLO": _decoupled_solo,
    "AdaptIS": _adaptis,
    "GeneralizedRCNN": _centermask,
    "YOLACT": _yolact,
}
