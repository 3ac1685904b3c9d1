"""Importing this package registers every backbone and meta-architecture."""

from . import backbone
from .adaptis import AdaptIS, AdaptISPredictor
from .segmentor import GroundTruth, InstanceSegmentor
from .solo import SOLO, DecoupledSOLO, SOLOv2
from .yolact import YOLACT

__all__ = [
    "AdaptIS",
    "AdaptISPredictor",
    "SOLO",
    "DecoupledSOLO",
    "GroundTruth",
    "InstanceSegmentor",
    "SOLOv2",
    "YOLACT",
    "backbone",
]
