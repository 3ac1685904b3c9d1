"""Configs of tiny models that the tests of all architectures share."""

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from example_inputs import NUM_CLASSES
from torch import nn

from solo_d2.config import load_config
from solo_d2.modeling.num_classes import num_classes_keys

RESNET = {
    "MODEL.BACKBONE.NAME": "build_resnet_fpn_backbone",
    "MODEL.RESNETS.DEPTH": 18,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 64,
    "MODEL.RESNETS.OUT_FEATURES": ["res2", "res3", "res4", "res5"],
    "MODEL.FPN.IN_FEATURES": ["res2", "res3", "res4", "res5"],
    "MODEL.FPN.OUT_CHANNELS": 32,
}
SOLO = {
    **RESNET,
    "MODEL.SOLO.NUM_GRIDS": [12, 10, 8, 6, 4],
    "MODEL.SOLO.CONV_DIM": 64,
    "MODEL.SOLO.NUM_CONVS": 1,
    "MODEL.SOLOV2.MASK_DIM": 64,
    "MODEL.SOLOV2.MASK_CONV_DIM": 64,
}
PANOPTIC_SOLO = {
    **SOLO,
    "MODEL.META_ARCHITECTURE": "PanopticSOLOv2",
    "MODEL.SEM_SEG_HEAD.NUM_CLASSES": 2,
    "MODEL.SEM_SEG_HEAD.CONVS_DIM": 64,
}
YOLACT = {
    "MODEL.META_ARCHITECTURE": "YOLACT",
    "MODEL.BACKBONE.NAME": "build_mobilenetv2_backbone",
    "MODEL.BACKBONE.FREEZE_AT": 0,
    "MODEL.MOBILENETV2.WIDTH_MULT": 0.25,
    "MODEL.MOBILENETV2.NORM": "BN",
    "MODEL.MOBILENETV2.OUT_FEATURES": ["res3", "res4", "res5"],
    "MODEL.YOLACT.INPUT_SIZE": 0,
    "MODEL.YOLACT.CONV_DIM": 32,
    "MODEL.YOLACT.NUM_PROTOTYPES": 8,
    "MODEL.YOLACT.ANCHOR_SIZES": [12, 24, 48, 96, 192],
}
YOLACT_PLUS = {
    **YOLACT,
    "MODEL.YOLACT.MASK_IOU.ENABLED": True,
    "MODEL.YOLACT.ANCHORS_PER_OCTAVE": 3,
    "MODEL.YOLACT.SQUARE_ANCHORS": False,
}
FCOS = {
    **RESNET,
    "MODEL.META_ARCHITECTURE": "GeneralizedRCNN",
    "MODEL.BACKBONE.NAME": "build_fcos_resnet_fpn_backbone",
    "MODEL.RESNETS.OUT_FEATURES": ["res3", "res4", "res5"],
    "MODEL.FPN.IN_FEATURES": ["res3", "res4", "res5"],
    "MODEL.PROPOSAL_GENERATOR.NAME": "FCOSProposalGenerator",
    "MODEL.FCOS.NUM_CLS_CONVS": 1,
    "MODEL.FCOS.NUM_BOX_CONVS": 1,
    "MODEL.ROI_HEADS.NAME": "CenterMaskROIHeads",
    "MODEL.ROI_HEADS.IN_FEATURES": ["p3", "p4", "p5"],
    "MODEL.MASK_ON": False,
}
CENTERMASK = {
    **FCOS,
    "MODEL.MASK_ON": True,
    "MODEL.ROI_MASK_HEAD.NAME": "SpatialAttentionMaskHead",
    "MODEL.ROI_MASK_HEAD.NUM_CONV": 1,
    "MODEL.ROI_MASK_HEAD.CONV_DIM": 16,
    "MODEL.CENTERMASK.MASK_IOU_NUM_CONV": 2,
    "MODEL.CENTERMASK.MASK_IOU_CONV_DIM": 16,
    "MODEL.CENTERMASK.MASK_IOU_FC_DIM": 16,
}
ADAPTIS = {
    "MODEL.META_ARCHITECTURE": "AdaptIS",
    "MODEL.BACKBONE.NAME": "build_mobilenetv2_fpn_backbone",
    "MODEL.BACKBONE.FREEZE_AT": 0,
    "MODEL.MOBILENETV2.WIDTH_MULT": 0.25,
    "MODEL.MOBILENETV2.NORM": "BN",
    "MODEL.FPN.IN_FEATURES": ["res2", "res3", "res4", "res5"],
    "MODEL.FPN.OUT_CHANNELS": 16,
    "MODEL.ADAPTIS.IN_FEATURES": ["p2", "p3", "p4", "p5"],
    "MODEL.ADAPTIS.FUSE_DIM": 16,
    "MODEL.ADAPTIS.HEAD": "cityscapes",
    "MODEL.ADAPTIS.NUM_POINTS": 4,
    "MODEL.ADAPTIS.CONV_DIM": 8,
    "MODEL.ADAPTIS.SEMANTIC_DIM": 8,
    "MODEL.ADAPTIS.PROPOSAL_DIM": 8,
}
EPS = {
    "MODEL.META_ARCHITECTURE": "EPS",
    "MODEL.BACKBONE.NAME": "build_mobilenetv2_backbone",
    "MODEL.BACKBONE.FREEZE_AT": 0,
    "MODEL.MOBILENETV2.WIDTH_MULT": 0.25,
    "MODEL.MOBILENETV2.NORM": "BN",
    "MODEL.MOBILENETV2.OUT_FEATURES": ["res3", "res4"],
    "MODEL.EPS.IN_FEATURES": ["res3", "res4"],
}


def tiny_config(settings: dict[str, object], **options) -> CfgNode:
    """A config on the CPU for ``NUM_CLASSES`` classes.

    Args:
        settings: one of the dicts above.
        options: more keys, with "__" in place of the dots.
    """
    cfg = load_config()
    more = {key.replace("__", "."): value for key, value in options.items()}
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ()
    values = {"MODEL.DEVICE": "cpu", "MODEL.MASK_ON": True, **settings, **more}
    cfg.merge_from_list([x for item in values.items() for x in item])
    for key in num_classes_keys(cfg):
        if key not in more:
            cfg.merge_from_list([key, NUM_CLASSES])
    return cfg


def tiny_model(settings: dict[str, object], **options) -> nn.Module:
    """Untrained, the same in each call."""
    torch.manual_seed(0)
    return build_model(tiny_config(settings, **options))
