from .decoupled_solo import DecoupledSOLO
from .panoptic import PanopticDecoupledSOLO, PanopticSOLO, PanopticSOLOv2
from .solo import SOLO
from .solov2 import SOLOv2

__all__ = [
    "SOLO",
    "DecoupledSOLO",
    "PanopticDecoupledSOLO",
    "PanopticSOLO",
    "PanopticSOLOv2",
    "SOLOv2",
]
