"""From the config to registered data sets."""

import os
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from .coco_json import register_coco_json, register_subset
from .shapes import register_shapes


def setup_datasets(cfg: CfgNode) -> None:
    """Register the data sets that a config describes and enter them into DATASETS.TRAIN and TEST.

    Call it once, after merging the config and before freezing it. "shapes_train" and "shapes_val"
    get the parameters of DATASETS.SHAPES. If DATASETS.CUSTOM names a json file, "<NAME>_train"
    and "<NAME>_val" replace DATASETS.TRAIN and DATASETS.TEST (by nothing, where only one is named).
    With DATASETS.OVERFIT_IMAGES both become the same few images.

    Raises:
        FileNotFoundError: a file or folder of DATASETS.CUSTOM is missing.
        ValueError: half of DATASETS.CUSTOM is missing, a json is wrong, or two of the data sets
            have different classes.
    """
    shapes = cfg.DATASETS.SHAPES
    register_shapes(
        train_images=shapes.TRAIN_IMAGES,
        val_images=shapes.VAL_IMAGES,
        image_size=shapes.IMAGE_SIZE,
        seed=shapes.SEED,
    )
    custom = cfg.DATASETS.CUSTOM
    splits = {
        "train": _register_custom(custom, "TRAIN"),
        "val": _register_custom(custom, "VAL"),
    }
    if any(splits.values()):
        cfg.DATASETS.TRAIN = splits["train"]
        cfg.DATASETS.TEST = splits["val"]
    _check_same_classes((*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST))
    if cfg.DATASETS.OVERFIT_IMAGES:
        subset = register_subset(cfg.DATASETS.TRAIN[0], cfg.DATASETS.OVERFIT_IMAGES)
        cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = (subset,)


def num_classes(cfg: CfgNode) -> int:
    """The number of classes of DATASETS.TRAIN, or of DATASETS.TEST where that says nothing.

    Raises:
        ValueError: neither is known.
    """
    names = (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)
    for name in names:
        classes = MetadataCatalog.get(name).get("thing_classes")
        if classes:
            return len(classes)
    raise ValueError(
        f"the number of classes is unknown: none of {list(names)} (DATASETS.TRAIN, DATASETS.TEST) "
        "is registered with class names"
    )


def _register_custom(custom: CfgNode, split: str) -> tuple[str, ...]:
    """The names of the sets that were registered, at most one."""
    json_key, images_key = f"{split}_JSON", f"{split}_IMAGES"
    if not custom[json_key] and not custom[images_key]:
        return ()
    for key, other in ((json_key, images_key), (images_key, json_key)):
        if not custom[key]:
            raise ValueError(f"DATASETS.CUSTOM.{key} is empty, but {other} is {custom[other]!r}")
    name = f"{custom.NAME}_{split.lower()}"
    register_coco_json(
        name,
        _find(custom[json_key], f"DATASETS.CUSTOM.{json_key}"),
        _find(custom[images_key], f"DATASETS.CUSTOM.{images_key}"),
    )
    return (name,)


def _find(path: str, key: str) -> Path:
    """The path itself if it exists, else under $DETECTRON2_DATASETS."""
    root = Path(os.environ.get("DETECTRON2_DATASETS", "datasets")).expanduser()
    candidates = dict.fromkeys([Path(path).expanduser(), root / Path(path).expanduser()])
    for candidate in candidates:
        if candidate.exists():
            return candidate
    raise FileNotFoundError(f"{key}: there is no {' nor '.join(map(str, candidates))}")


def _check_same_classes(names: tuple[str, ...]) -> None:
    known = {name: MetadataCatalog.get(name).get("thing_classes") for name in names}
    known = {name: classes for name, classes in known.items() if classes is not None}
    if not known:
        return
    first = next(iter(known))
    for name, classes in known.items():
        if classes == known[first]:
            continue
        sources = [f"{n!r} ({MetadataCatalog.get(n).get('json_file')})" for n in (first, name)]
        pairs = zip([*known[first], "nothing"], [*classes, "nothing"])
        index, (a, b) = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
        raise ValueError(
            f"data sets {sources[0]} and {sources[1]} must have the same classes in the same "
            f"order, but they have {len(known[first])} and {len(classes)}; "
            f"class {index} is {a!r} in one and {b!r} in the other"
        )
