"""Instance segmentation models for Detectron2. Importing this package registers them."""

from .tools.env import missing_requirement

_missing = missing_requirement()
if _missing:
    # `python -m solo_d2 env` must run all the same, and says more

    def __getattr__(name: str) -> object:
        raise ImportError(_missing)

else:
    from . import data, modeling
    from .config import add_solo_d2_config
    from .model_zoo import get_config_file, list_models
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
        "get_config_file",
        "list_models",
        "modeling",
    ]

__version__ = "0.1.0"
