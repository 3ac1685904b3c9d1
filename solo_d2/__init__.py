"""SOLOv2 and its relatives as models of Detectron2. Importing this package registers them."""

from .env import require_detectron2

if require_detectron2():
    from . import data, modeling
    from .config import add_solo_d2_config
    from .modeling import SOLO, DecoupledSOLO, InstanceSegmentor, SOLOv2

    __all__ = [
        "SOLO",
        "DecoupledSOLO",
        "InstanceSegmentor",
        "SOLOv2",
        "add_solo_d2_config",
        "data",
        "modeling",
    ]

__version__ = "0.1.0"
