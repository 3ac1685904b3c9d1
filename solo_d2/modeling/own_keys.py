"""Config keys that Detectron2's own trainer and mapper do not know, and the warning about them."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN

from .num_classes import get_value

_OPTIMIZER = "return solo_d2.engine.build_optimizer(cfg, model) from your trainer's build_optimizer"
_MAPPER = "pass mapper=solo_d2.data.InstanceMapper(cfg) to build_detection_train_loader"
_LABEL_MAPPER = _MAPPER.replace("InstanceMapper", "ImageLabelMapper")
_DATASETS = "call solo_d2.data.setup_datasets(cfg) before you freeze the config"

# key -> (the value that has no effect, how to honor the key in another pipeline)
OWN_KEYS = {
    "MODEL.EPS.SALIENCY_FOLDER": ("", _LABEL_MAPPER),
    "SOLVER.OPTIMIZER": ("SGD", _OPTIMIZER),
    "SOLVER.CLIP_TOTAL_GRAD_NORM": (0.0, _OPTIMIZER),
    "SOLVER.BACKBONE_MULTIPLIER": (1.0, _OPTIMIZER),
    "INPUT.AUGMENTATION": ("default", _MAPPER),
    "DATASETS.OVERFIT_IMAGES": (0, _DATASETS),
}

_honored = False
_warned: set[str] = set()


@contextmanager
def all_keys_honored() -> Iterator[None]:
    """Models built within the block do not warn, because their pipeline honors every key."""
    global _honored
    before, _honored = _honored, True
    try:
        yield
    finally:
        _honored = before


def warn_about_own_keys(cfg: CfgNode) -> None:
    """Warn once, when a model is built, about the keys set in ``cfg`` that need solo_d2's trainer.

    There is no warning within ``all_keys_honored``.

    Raises:
        ValueError: no pipeline can honor ``cfg``, see ``refuse_test_time_augmentation``.
    """
    refuse_test_time_augmentation(cfg)
    remedies = {
        f"{key} {get_value(cfg, key)!r}": remedy
        for key, (neutral, remedy) in OWN_KEYS.items()
        if get_value(cfg, key) != neutral
    }
    message = "; ".join(f"{setting} ({remedy})" for setting, remedy in remedies.items())
    if _honored or not message or message in _warned:
        return
    _warned.add(message)
    logging.getLogger(__name__).warning(
        "Training with Detectron2's DefaultTrainer ignores these settings, which "
        f"solo_d2.engine.Trainer honors: {message}"
    )


def refuse_test_time_augmentation(cfg: CfgNode) -> None:
    """
    Raises:
        ValueError: TEST.AUG is enabled for an architecture that Detectron2's
            ``GeneralizedRCNNWithTTA`` does not know how to augment.
    """
    name = cfg.MODEL.META_ARCHITECTURE
    if cfg.TEST.AUG.ENABLED and not issubclass(META_ARCH_REGISTRY.get(name), GeneralizedRCNN):
        raise ValueError(
            f"TEST.AUG.ENABLED must be False: {name} has no test-time augmentation, only models "
            "with MODEL.META_ARCHITECTURE GeneralizedRCNN do"
        )
