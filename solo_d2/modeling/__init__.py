"""Importing this package registers every backbone and meta-architecture."""

from . import backbone
from .adaptis import AdaptIS, AdaptISPredictor
from .segmentor import GroundTruth, InstanceSegmentor
from .solo import SOLO, DecoupledSOLO, SOLOv2

__all__ = [
    "AdaptIS",
    "AdaptISPredictor",
    "SOLO",
    "DecoupledSOLO",
    "GroundTruth",
    "InstanceSegmentor",
    "SOLOv2",
    "backbone",
]
