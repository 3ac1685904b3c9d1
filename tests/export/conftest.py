"""Tiny models of every architecture, on a backbone of a few convolutions: exports take seconds."""

import re
from collections.abc import Callable

import pytest
import tiny_models
import torch
from detectron2.data import transforms as T
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone, build_model
from torch import nn

from solo_d2.export.check import raw_instances
from solo_d2.export.files import build_graph, describe
from solo_d2.export.graph import Graph
from solo_d2.export.metadata import Metadata

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


def build_tiny_pyramid(cfg, input_shape):
    return TinyPyramid()


BACKBONE_REGISTRY.register(build_tiny_pyramid)


SOLO = {
    "MODEL.SOLO.NUM_GRIDS": [9, 8, 6, 5, 4],
    "MODEL.SOLO.CONV_DIM": 32,
    "MODEL.SOLO.NUM_CONVS": 1,
    "MODEL.SOLOV2.MASK_DIM": 32,
    "MODEL.SOLOV2.MASK_CONV_DIM": 32,
    "MODEL.SOLO.UPDATE_THRESH_TEST": 0.0,
    # more than there are: at a limit, float noise decides between candidates of equal scores
    "MODEL.SOLO.MAX_CANDIDATES_TEST": 400,
    "TEST.DETECTIONS_PER_IMAGE": 400,
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
    pyramid = {
        "MODEL.BACKBONE.NAME": "build_tiny_pyramid",
        "MODEL.PIXEL_STD": [58.0, 57.0, 57.0],
    }
    return tiny_models.tiny_config({**pyramid, **SETTINGS[name]}, **options)


def tiny_model(name: str, **options) -> nn.Module:
    """In eval mode, with weights that tell places and classes apart."""
    torch.manual_seed(0)
    model = build_model(tiny_config(name, **options)).eval()
    for pattern, std in ((r"box_pred", 0.02), (r"(kernel|category|coefficient)_pred", 0.1)):
        for weight in _parameters(model, rf"{pattern}\.weight"):
            nn.init.normal_(weight, std=std)
    for weight in _parameters(model, r"((mask|x|y)_pred\.\d|offset|predictor|_logits)\.weight"):
        nn.init.normal_(weight, std=0.2)
    for bias in _parameters(model, r"((mask|x|y)_pred\.\d|category_pred)\.bias"):
        nn.init.zeros_(bias)
    for bias in _parameters(model, r"box_pred\.bias|mask_iou_head\.predictor\.bias"):
        nn.init.constant_(bias, 0.5)
    if name.startswith("AdaptIS"):
        factor, offset = model.selection_head.rescale
        nn.init.constant_(model.selection_head.predictor.bias, -offset / factor)
        nn.init.constant_(model.proposal_head.predictor.bias, 1.5)
    return model


def _parameters(model: nn.Module, pattern: str) -> list[nn.Parameter]:
    return [p for name, p in model.named_parameters() if re.search(pattern, name)]


def noise(size: tuple[int, int], seed: int = 0) -> torch.Tensor:
    return torch.rand(3, *size, generator=torch.Generator().manual_seed(seed)) * 255


def metadata_of(graph: Graph, **options) -> Metadata:
    return describe(
        graph,
        class_names=["disc", "square", "star"],
        category_ids=[7, 8, 9],
        channel_order="RGB",
        resize=T.ResizeShortestEdge(96, 200),
        **options,
    )


def set_threshold(model: nn.Module, value: float) -> None:
    """Of the scores of candidates."""
    if hasattr(model, "detector"):
        model.detector.score_threshold = value
    else:
        model.proposal_generator.score_threshold_test = value


def bisect(is_high: Callable[[float], bool], steps: int = 24) -> tuple[float, float]:
    """(a value for which it is false, a slightly higher one for which it is true) in [0, 1]."""
    low, high = 0.0, 1.0
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (low, middle) if is_high(middle) else (middle, high)
    return low, high


class Scenes:
    """Images in which a model finds much, something and nothing; sets its score threshold."""

    def __init__(self, model: nn.Module, size: tuple[int, int] = (96, 160)):
        self.many = noise(size)
        self.none = model.pixel_mean.expand(3, *size).clone()

        def is_clear(threshold: float) -> bool:
            set_threshold(model, threshold)
            return len(raw_instances(model, self.none)) == 0

        set_threshold(model, bisect(is_clear)[1] + 1e-3)

        def mixed(share: float) -> torch.Tensor:
            return torch.lerp(self.none, self.many, share)

        _, share = bisect(lambda x: len(raw_instances(model, mixed(x))) > 0)
        self.few = mixed(share)
        self.found = [len(raw_instances(model, x)) for x in (self.none, self.few, self.many)]


@pytest.fixture(scope="session")
def tiny():
    """What this file has, for the tests."""
    import types

    return types.SimpleNamespace(
        model=tiny_model,
        config=tiny_config,
        noise=noise,
        metadata=metadata_of,
        Scenes=Scenes,
        graph=build_graph,
    )
