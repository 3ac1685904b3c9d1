"""Importing this package registers every backbone and meta-architecture."""

from . import backbone
from .adaptis import AdaptIS, AdaptISPredictor
from .centermask import CenterMaskROIHeads, FCOSProposalGenerator, SpatialAttentionMaskHead
from .eps import EPS
from .segmentor import GroundTruth, InstanceSegmentor
from .solo import SOLO, DecoupledSOLO, SOLOv2
from .yolact import YOLACT

__all__ = [
    "AdaptIS",
    "AdaptISPredictor",
    "EPS",
    "CenterMaskROIHeads",
    "FCOSProposalGenerator",
    "SOLO",
    "DecoupledSOLO",
    "GroundTruth",
    "InstanceSegmentor",
    "SOLOv2",
    "SpatialAttentionMaskHead",
    "YOLACT",
    "backbone",
]
