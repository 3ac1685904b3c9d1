"""The number of classes, from the data unless set."""

from solo_d2.config import get_value
from solo_d2.data import num_classes


def resolve_num_classes(cfg, key: str) -> int:
    """The config's number of classes, or the training set's where the config has -1.

    Args:
        cfg: a config.
        key: full name of the key, for example "MODEL.SOLO.NUM_CLASSES".

    Raises:
        ValueError: the config and the data disagree, or neither says a number.
    """
    configured = get_value(cfg, key)
    try:
        known = num_classes(cfg)
    except ValueError as error:
        if configured == -1:
            raise ValueError(f"{key} is -1 (from the data), but {error}") from None
        return configured
    if configured not in (-1, known):
        name = (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)[0]
        raise ValueError(
            f"{key} is {configured}, but data set {name!r} has {known} classes; "
            f"set it to {known}, or to -1 to take the number from the data"
        )
    return known
