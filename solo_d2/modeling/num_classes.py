"""The number of classes, from the data unless set."""

from detectron2.data import MetadataCatalog


def resolve_num_classes(cfg, key: str) -> int:
    """The config's number of classes, or the training set's where the config has -1.

    Args:
        cfg: a config.
        key: full name of the key, for example "MODEL.SOLO.NUM_CLASSES".

    Raises:
        ValueError: the config and the data disagree, or neither says a number.
    """
    configured = cfg
    for part in key.split("."):
        configured = configured[part]
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        names = MetadataCatalog.get(name).get("thing_classes")
        if names is None:
            continue
        if configured not in (-1, len(names)):
            raise ValueError(
                f"{key} is {configured}, but data set {name!r} has {len(names)} classes; "
                f"set it to {len(names)}, or to -1 to take the number from the data"
            )
        return len(names)
    if configured == -1:
        raise ValueError(
            f"{key} is -1 (from the data), but no data set in DATASETS.TRAIN or DATASETS.TEST "
            "is registered with its classes; set the number"
        )
    return configured
