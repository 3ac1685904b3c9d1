"""Instance segmentation models for Detectron2. Importing this package registers them."""

import warnings as _warnings

from .tools.env import missing_requirement

_missing = missing_requirement()
if _missing:
    # `python -m solo_d2 env` must still run: it prints more details

    def __getattr__(name: str) -> object:
        raise ImportError(_missing)

else:
    with _warnings.catch_warnings():
        # fvcore and Detectron2 use features that PyTorch has deprecated
        _warnings.simplefilter("ignore", FutureWarning)
        from . import data, modeling
        from .config import add_solo_d2_config
        from .model_zoo import get_config_file, list_models
        from .modeling import (
            EPS,
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
        from .predictor import Predictor, Result, load

    __all__ = [
        "EPS",
        "SOLO",
        "YOLACT",
        "AdaptIS",
        "AdaptISPredictor",
        "CenterMaskROIHeads",
        "DecoupledSOLO",
        "FCOSProposalGenerator",
        "InstanceSegmentor",
        "Predictor",
        "Result",
        "SOLOv2",
        "add_solo_d2_config",
        "data",
        "get_config_file",
        "list_models",
        "load",
        "modeling",
    ]

__version__ = "0.1.0"
