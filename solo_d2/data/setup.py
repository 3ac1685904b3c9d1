"""From the config to registered data sets."""

import os
from pathlib import Path
from typing import NamedTuple

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from solo_d2.modeling.num_classes import (
    dataset_num_classes,
    get_value,
    num_classes_keys,
    write_num_classes,
)

from .coco_json import register_coco_json, register_subset
from .shapes import SHAPES
from .toys import RODS, TUBES

EMBEDDED = {drawn.name: drawn for drawn in (SHAPES, RODS, TUBES)}


def setup_datasets(cfg: CfgNode) -> None:
    """Register the data sets that a config describes and enter them into DATASETS.TRAIN and TEST.

    Call it once, after merging the config and before freezing it. "shapes_train" and "shapes_val"
    get the parameters of DATASETS.SHAPES, "rods_*" and "tubes_*" likewise. If DATASETS.CUSTOM
    names a json file, "<NAME>_train" and "<NAME>_val" replace DATASETS.TRAIN and DATASETS.TEST (by
    nothing, where only one is named).
    With DATASETS.OVERFIT_IMAGES or OVERFIT_IMAGE_IDS both become the same few images. Where a
    model of Detectron2's own is told -1 classes, the number of the data takes its place, since it
    needs a number. Data without classes of stuff get one, the background, which panoptic outputs
    refer to.

    Raises:
        FileNotFoundError: a file or folder of DATASETS.CUSTOM is missing.
        ValueError: half of DATASETS.CUSTOM is missing, a json is wrong, two of the data sets
            have different classes, or images to overfit are asked for that there are not.
    """
    register_embedded(cfg)
    custom = find_custom(cfg)
    splits = {split: (data_set.name,) if data_set else () for split, data_set in custom.items()}
    for data_set in filter(None, custom.values()):
        register_coco_json(*data_set)
    if any(splits.values()):
        cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = splits["TRAIN"], splits["VAL"]
    _check_same_classes((*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST))
    few, ids = cfg.DATASETS.OVERFIT_IMAGES, cfg.DATASETS.OVERFIT_IMAGE_IDS
    if few and ids:
        raise ValueError("give DATASETS.OVERFIT_IMAGES or DATASETS.OVERFIT_IMAGE_IDS, not both")
    if few or ids:
        subset = register_subset(cfg.DATASETS.TRAIN[0], ids or few)
        cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = (subset,)
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        if not MetadataCatalog.get(name).get("stuff_classes"):
            MetadataCatalog.get(name).stuff_classes = ["background"]
    if any(get_value(cfg, key) == -1 for key in num_classes_keys(cfg)):
        try:
            write_num_classes(cfg, dataset_num_classes(cfg))
        except ValueError:  # no data set at all: the model says so, if it is built
            pass


class CustomSet(NamedTuple):
    """A data set of DATASETS.CUSTOM; its files exist."""

    name: str
    json_file: Path
    image_root: Path


def register_embedded(cfg: CfgNode) -> None:
    """Register the embedded sets with the parameters of DATASETS.SHAPES, .RODS and .TUBES."""
    for name, drawn in EMBEDDED.items():
        parameters = cfg.DATASETS[name.upper()]
        drawn.register(
            train_images=parameters.TRAIN_IMAGES,
            val_images=parameters.VAL_IMAGES,
            image_size=parameters.IMAGE_SIZE,
            seed=parameters.SEED,
        )


def find_custom(cfg: CfgNode) -> dict[str, CustomSet | None]:
    """What DATASETS.CUSTOM names for "TRAIN" and for "VAL"; None for nothing.

    Raises:
        FileNotFoundError: a file or folder is missing.
        ValueError: half of a pair is missing.
    """
    custom = cfg.DATASETS.CUSTOM
    found: dict[str, CustomSet | None] = {"TRAIN": None, "VAL": None}
    for split in found:
        json_key, images_key = f"{split}_JSON", f"{split}_IMAGES"
        if not custom[json_key] and not custom[images_key]:
            continue
        for key, other in ((json_key, images_key), (images_key, json_key)):
            if not custom[key]:
                raise ValueError(
                    f"DATASETS.CUSTOM.{key} is empty, but {other} is {custom[other]!r}"
                )
        json_file, image_root = (
            _find(custom[key], f"DATASETS.CUSTOM.{key}") for key in (json_key, images_key)
        )
        found[split] = CustomSet(f"{custom.NAME}_{split.lower()}", json_file, image_root)
    return found


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
    sources = {
        f"{name!r} ({MetadataCatalog.get(name).get('json_file')})": classes
        for name, classes in known.items()
        if classes is not None
    }
    message = class_mismatch(sources)
    if message:
        raise ValueError(message)


def class_mismatch(sources: dict[str, list[str]]) -> str:
    """The first difference between the class names of data sets, "" if there is none."""
    for source, classes in sources.items():
        first = next(iter(sources))
        if classes == sources[first]:
            continue
        pairs = zip([*sources[first], "nothing"], [*classes, "nothing"])
        index, (a, b) = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
        return (
            f"data sets {first} and {source} must have the same classes in the same "
            f"order, but they have {len(sources[first])} and {len(classes)}; "
            f"class {index} is {a!r} in one and {b!r} in the other"
        )
    return ""
