"""Instance segmentation models for Detectron2. Importing this package registers them."""

from .env import require_detectron2

if require_detectron2():
    from . import data, modeling
    from .config import add_solo_d2_config
    from .modeling import (
        SOLO,
        YOLACT,
        AdaptIS,
        AdaptISPredictor,
        CenterMaskROIHeads,
        DecoupledSOLO,
        FCOSProposalGenerator,
        InstanceSegmentor,
        SOLOv2,
    )

    __all__ = [
        "SOLO",
        "YOLACT",
        "AdaptIS",
        "AdaptISPredictor",
        "CenterMaskROIHeads",
        "DecoupledSOLO",
        "FCOSProposalGenerator",
        "InstanceSegmentor",
        "SOLOv2",
        "add_solo_d2_config",
        "data",
        "modeling",
    ]

__version__ = "0.1.0"
