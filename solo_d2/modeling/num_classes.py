"""The number of classes: as configured, or that of the training set if the config says -1."""

import os
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.proposal_generator import PROPOSAL_GENERATOR_REGISTRY
from detectron2.utils import comm

from solo_d2.files import atomic_write

# For Detectron2's own models; a model of solo_d2 has the attribute ``num_classes_key``.
_DETECTRON2_KEYS = {
    "RetinaNet": "MODEL.RETINANET.NUM_CLASSES",
    "FCOS": "MODEL.RETINANET.NUM_CLASSES",
}


def num_classes_keys(cfg: CfgNode) -> tuple[str, ...]:
    """Names of the config keys that hold the number of classes of the model of ``cfg``."""
    architecture = cfg.MODEL.META_ARCHITECTURE
    key = getattr(META_ARCH_REGISTRY.get(architecture), "num_classes_key", None)
    key = key or _DETECTRON2_KEYS.get(architecture)
    if key:
        return (key,)
    keys = ["MODEL.ROI_HEADS.NUM_CLASSES"]
    if "POINT_HEAD" in cfg.MODEL:
        keys.append("MODEL.POINT_HEAD.NUM_CLASSES")
    generator = cfg.MODEL.PROPOSAL_GENERATOR.NAME
    if generator in PROPOSAL_GENERATOR_REGISTRY:
        key = getattr(PROPOSAL_GENERATOR_REGISTRY.get(generator), "num_classes_key", None)
        keys[:0] = [key] if key else []
    return tuple(keys)


def get_value(cfg: CfgNode, key: str) -> Any:
    """The value of a key such as "MODEL.MASK_ON"."""
    for part in key.split("."):
        cfg = cfg[part]
    return cfg


def dataset_num_classes(cfg: CfgNode, *, load: bool = True) -> int:
    """The number of classes of DATASETS.TRAIN, or of DATASETS.TEST if that is unknown.

    Args:
        cfg: a config.
        load: load a data set whose metadata have no class names yet, as is the case after
            ``register_coco_instances``.

    Raises:
        ValueError: neither is known.
    """
    names = (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)
    for name in filter(lambda name: isinstance(name, str), names):
        if load and name in DatasetCatalog and not MetadataCatalog.get(name).get("thing_classes"):
            DatasetCatalog.get(name)
        classes = MetadataCatalog.get(name).get("thing_classes")
        if classes:
            return len(classes)
    raise ValueError(
        f"the number of classes is unknown: none of {list(names)} (DATASETS.TRAIN, DATASETS.TEST) "
        "is registered with class names"
    )


def resolve_num_classes(cfg: CfgNode, key: str) -> int:
    """The config's number of classes, or the training set's where the config has -1.

    The number of the training set also replaces the -1 in ``cfg``, and in the ``config.yaml`` that
    ``default_setup`` wrote before the model was built. So this file and a checkpoint are enough to
    load the model where the data set is not registered.

    Args:
        cfg: a config.
        key: full name of the key, for example "MODEL.SOLO.NUM_CLASSES".

    Raises:
        ValueError: the config and the data disagree, or neither gives a number.
    """
    configured = get_value(cfg, key)
    try:
        known = dataset_num_classes(cfg, load=configured == -1)
    except ValueError as error:
        if configured == -1:
            raise ValueError(f"{key} is -1 (from the data), but {error}") from None
        return configured
    if configured == -1:
        write_num_classes(cfg, known)
    elif configured != known:
        name = (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)[0]
        raise ValueError(
            f"{key} is {configured}, but data set {name!r} has {known} classes; "
            f"set it to {known}, or to -1 to take the number from the data"
        )
    return known


def write_num_classes(cfg: CfgNode, num_classes: int) -> None:
    """Replace each -1 among ``num_classes_keys`` in ``cfg``, and in its dump in OUTPUT_DIR."""
    dumped = cfg.dump()
    frozen = cfg.is_frozen()
    cfg.defrost()
    for key in num_classes_keys(cfg):
        if get_value(cfg, key) == -1:
            cfg.merge_from_list([key, num_classes])
    if frozen:
        cfg.freeze()
    path = os.path.join(cfg.OUTPUT_DIR, "config.yaml")
    if comm.is_main_process() and os.path.isfile(path):
        with open(path, encoding="utf-8") as file:
            is_this_config = file.read() == dumped
        if is_this_config:
            with atomic_write(path) as file:
                file.write(cfg.dump().encode())
