"""Importing this package registers every backbone and meta-architecture."""

from . import backbone
from .segmentor import GroundTruth, InstanceSegmentor
from .solo import SOLOv2

__all__ = ["GroundTruth", "InstanceSegmentor", "SOLOv2", "backbone"]
