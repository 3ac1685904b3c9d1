"""Tiny models of every architecture, on a backbone of a few convolutions, for quick exports."""

import re

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone, build_model
from torch import nn

from solo_d2.config import load_config
from solo_d2.modeling.num_classes import num_classes_keys

NUM_CLASSES = 3
CHANNELS = 32  # GroupNorm has 32 groups


class TinyPyramid(Backbone):
    """p2 to p7, each by one strided convolution of the one before."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, CHANNELS, 4, stride=4)
        self.steps = nn.ModuleList(
            nn.Conv2d(CHANNELS, CHANNELS, 3, stride=2, padding=1) for _ in range(5)
        )

    @property
    def size_divisibility(self) -> int:
        return 32

    def output_shape(self):
        return {f"p{k}": ShapeSpec(channels=CHANNELS, stride=2**k) for k in range(2, 8)}

    def forward(self, x):
        features = {"p2": self.stem(x)}
        for k, step in enumerate(self.steps, start=2):
            features[f"p{k + 1}"] = step(features[f"p{k}"].relu())
        return features


@BACKBONE_REGISTRY.register()
def build_tiny_pyramid(cfg, input_shape):
    return TinyPyramid()


SOLO = {
    "MODEL.SOLO.NUM_GRIDS": [9, 8, 6, 5, 4],
    "MODEL.SOLO.CONV_DIM": 32,
    "MODEL.SOLO.NUM_CONVS": 1,
    "MODEL.SOLOV2.MASK_DIM": 32,
    "MODEL.SOLOV2.MASK_CONV_DIM": 32,
    "MODEL.SOLO.UPDATE_THRESH_TEST": 0.0,
    "MODEL.SOLO.MAX_CANDIDATES_TEST": 50,
}
YOLACT = {
    "MODEL.META_ARCHITECTURE": "YOLACT",
    "MODEL.YOLACT.IN_FEATURES": ["p3", "p4", "p5"],
    "MODEL.YOLACT.INPUT_SIZE": 0,
    "MODEL.YOLACT.CONV_DIM": 16,
    "MODEL.YOLACT.NUM_PROTOTYPES": 4,
    "MODEL.YOLACT.ANCHOR_SIZES": [12, 24, 48, 96, 192],
}
FCOS = {
    "MODEL.META_ARCHITECTURE": "GeneralizedRCNN",
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
    "MODEL.ROI_MASK_HEAD.CONV_DIM": 8,
    "MODEL.CENTERMASK.MASK_IOU_NUM_CONV": 1,
    "MODEL.CENTERMASK.MASK_IOU_CONV_DIM": 8,
    "MODEL.CENTERMASK.MASK_IOU_FC_DIM": 8,
}
ADAPTIS = {
    "MODEL.META_ARCHITECTURE": "AdaptIS",
    "MODEL.ADAPTIS.IN_FEATURES": ["p2", "p3"],
    "MODEL.ADAPTIS.FUSE_DIM": 8,
    "MODEL.ADAPTIS.CONV_DIM": 8,
    "MODEL.ADAPTIS.SEMANTIC_DIM": 8,
    "MODEL.ADAPTIS.PROPOSAL_DIM": 8,
    "MODEL.ADAPTIS.STAGE": "proposals",
}
SETTINGS = {
    "SOLO": {**SOLO, "MODEL.META_ARCHITECTURE": "SOLO"},
    "DecoupledSOLO": {**SOLO, "MODEL.META_ARCHITECTURE": "DecoupledSOLO"},
    "SOLOv2": {**SOLO, "MODEL.META_ARCHITECTURE": "SOLOv2"},
    "SOLOv2 DCN": {
        **SOLO,
        "MODEL.META_ARCHITECTURE": "SOLOv2",
        "MODEL.SOLO.DEFORM": "all",
        "MODEL.SOLO.DEFORM_MODULATED": True,
        "MODEL.SOLOV2.MASK_DEFORM": True,
        "MODEL.SOLO.CATEGORY_ALIGN": "region_grid",
    },
    "YOLACT": YOLACT,
    "YOLACT square": {**YOLACT, "MODEL.YOLACT.INPUT_SIZE": 130},
    "YOLACT cross-class": {**YOLACT, "MODEL.YOLACT.NMS_TYPE": "cross_class"},
    "YOLACT++": {**YOLACT, "MODEL.YOLACT.MASK_IOU.ENABLED": True},
    "FCOS": FCOS,
    "CenterMask": CENTERMASK,
    "CenterMask area": {**CENTERMASK, "MODEL.CENTERMASK.ASSIGN_CRITERION": "area"},
    "AdaptIS": {**ADAPTIS, "MODEL.ADAPTIS.HEAD": "toy"},
    "AdaptIS cityscapes": {**ADAPTIS, "MODEL.ADAPTIS.HEAD": "cityscapes"},
}


def tiny_config(name: str, **options):
    """Its config; options have "__" for "."."""
    cfg = load_config()
    settings = {
        "MODEL.DEVICE": "cpu",
        "MODEL.MASK_ON": True,
        "MODEL.BACKBONE.NAME": "build_tiny_pyramid",
        **SETTINGS[name],
        **{key.replace("__", "."): value for key, value in options.items()},
    }
    cfg.merge_from_list([x for item in settings.items() for x in item])
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ()
    for key in num_classes_keys(cfg):
        cfg.merge_from_list([key, NUM_CLASSES])
    return cfg


def tiny_model(name: str, **options) -> nn.Module:
    """In eval mode, with weights that tell places and classes apart."""
    torch.manual_seed(0)
    model = build_model(tiny_config(name, **options)).eval()
    for parameter_name, parameter in model.named_parameters():
        if re.search(r"(kernel|mask|x|y|category|box|coefficient)_pred\.weight", parameter_name):
            nn.init.normal_(parameter, std=0.3)
        elif re.search(r"class_logits\.weight|centerness\.weight|offset\.weight", parameter_name):
            nn.init.normal_(parameter, std=0.2)
        elif re.search(r"(box_pred|mask_iou_head.predictor)\.bias", parameter_name):
            nn.init.constant_(parameter, 1.0)
        elif re.search(r"category_pred\.bias|proposal_generator.*class_logits\.bias", parameter_name):
            nn.init.constant_(parameter, -1.0)
        elif parameter_name == "semantic_head.predictor.bias":
            parameter.data[1:] += 1.0
        elif parameter_name == "selection_head.predictor.bias":
            parameter.data += 2.0
    return model


def noise(size: tuple[int, int], seed: int = 0) -> torch.Tensor:
    return torch.rand(3, *size, generator=torch.Generator().manual_seed(seed)) * 255
