"""From the config to registered data sets."""

from pathlib import Path
from typing import NamedTuple

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.file_io import PathManager

from solo_d2.modeling.num_classes import (
    dataset_num_classes,
    get_value,
    num_classes_keys,
    write_num_classes,
)

from .catalog import (
    DATASETS_HINT,
    SubsetLoader,
    check_image_headers,
    check_images_exist,
    enter,
    find_path,
    is_free,
    register_coco_json,
    source_file,
)
from .coco import SKIPPED
from .shapes import SHAPES


def setup_datasets(cfg: CfgNode) -> None:
    """Register the data sets that a config describes and set DATASETS.TRAIN and TEST to them.

    Call it once, after merging the config and before freezing it. "shapes_train" and "shapes_val"
    get the parameters of DATASETS.SHAPES. If DATASETS.CUSTOM names a json file, "<NAME>_train" and
    "<NAME>_val" replace DATASETS.TRAIN and DATASETS.TEST (if only one is named, the other becomes
    empty). With DATASETS.OVERFIT_IMAGES both become the same few images. A number of classes of -1
    is replaced by that of the data. Data sets that others registered are not changed.

    Raises:
        FileNotFoundError: a file or folder of DATASETS.CUSTOM, or one of its images, is missing.
        ValueError: half of DATASETS.CUSTOM is missing, a json is refused or has nothing to train
            on, a validation image has another size than in the json, two of the data sets have
            different classes, or there are fewer images than DATASETS.OVERFIT_IMAGES.
    """
    register_shapes(cfg)
    custom = find_custom(cfg)
    for split, data_set in custom.items():
        _register_custom(cfg, data_set, is_train=split == "TRAIN")
    if custom:
        cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (
            (custom[split].name,) if split in custom else () for split in ("TRAIN", "VAL")
        )
    _check_same_classes((*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST))
    if cfg.DATASETS.OVERFIT_IMAGES:
        parent, count = cfg.DATASETS.TRAIN[0], cfg.DATASETS.OVERFIT_IMAGES
        subset = SubsetLoader(f"{parent}_first{count}", parent, count)
        enter(subset)
        subset()
        cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = (subset.name,)
    if any(get_value(cfg, key) == -1 for key in num_classes_keys(cfg)):
        try:
            write_num_classes(cfg, dataset_num_classes(cfg))
        except ValueError:  # no data set at all: building a model will report it
            pass


def require_images(cfg: CfgNode) -> None:
    """Check that every image of DATASETS.TEST exists, before a training run and not after it.

    Raises:
        FileNotFoundError: some are missing (the message counts them and names the first), or a json
            file of DATASETS.TRAIN or TEST is missing.
    """
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        json_file = MetadataCatalog.get(name).get("json_file") if isinstance(name, str) else None
        if json_file and not PathManager.exists(json_file):
            raise FileNotFoundError(f"data set {name!r}: no file {json_file}. {DATASETS_HINT}")
    for name in cfg.DATASETS.TEST:
        records = DatasetCatalog.get(name)
        if isinstance(records, list):
            check_images_exist([r for r in records if "file_name" in r], name)


class CustomSet(NamedTuple):
    """A data set of DATASETS.CUSTOM; its files exist."""

    name: str
    json_file: Path
    image_root: Path


def _register_custom(cfg: CfgNode, data_set: CustomSet, *, is_train: bool) -> None:
    coco = register_coco_json(
        *data_set, masks=cfg.MODEL.MASK_ON, crowd_is_object=cfg.DATASETS.CUSTOM.CROWD_IS_OBJECT
    )
    if is_train and not coco.objects:
        reason = coco.counts(SKIPPED) or "there are no annotations"
        hint = " (without MODEL.MASK_ON, a box is enough)" if "no segmentation" in reason else ""
        raise ValueError(f"{data_set.json_file}: no object to train on: {reason}{hint}")
    if is_train and cfg.MODEL.MASK_ON and cfg.INPUT.MASK_FORMAT == "polygon":
        for annotation in coco.document["annotations"]:
            if isinstance(annotation["segmentation"], dict) and not annotation["iscrowd"]:
                raise ValueError(
                    f"{data_set.json_file}: the mask of annotation {annotation['id']} is an RLE; "
                    'set INPUT.MASK_FORMAT to "bitmask"'
                )
    records = DatasetCatalog.get(data_set.name)  # checks that the images exist
    if not is_train:  # fail now rather than at the first evaluation
        check_image_headers(records)


def register_shapes(cfg: CfgNode) -> None:
    """Register "shapes_*" with the parameters of DATASETS.SHAPES, unless the names are taken."""
    parameters = cfg.DATASETS.SHAPES
    if len(parameters.IMAGE_SIZE) != 2:
        raise ValueError(
            "DATASETS.SHAPES.IMAGE_SIZE must be a height and a width, not "
            f"{[*parameters.IMAGE_SIZE]}"
        )
    if is_free("shapes_train") and is_free("shapes_val"):
        SHAPES.register(
            train_images=parameters.TRAIN_IMAGES,
            val_images=parameters.VAL_IMAGES,
            image_size=parameters.IMAGE_SIZE,
            seed=parameters.SEED,
        )


def find_custom(cfg: CfgNode) -> dict[str, CustomSet]:
    """The sets that DATASETS.CUSTOM names, for "TRAIN", "VAL" or both.

    Raises:
        FileNotFoundError: a file or folder is missing.
        ValueError: half of a pair is missing.
    """
    custom = cfg.DATASETS.CUSTOM
    found = {}
    for split in ("TRAIN", "VAL"):
        keys = [f"{split}_JSON", f"{split}_IMAGES"]
        given = [key for key in keys if custom[key]]
        if len(given) == 1:
            empty = next(key for key in keys if not custom[key])
            raise ValueError(
                f"DATASETS.CUSTOM.{empty} is empty, but {given[0]} is {custom[given[0]]!r}"
            )
        if given:
            paths = [find_path(custom[key], f"DATASETS.CUSTOM.{key}") for key in keys]
            found[split] = CustomSet(f"{custom.NAME}_{split.lower()}", *paths)
    return found


def _check_same_classes(names: tuple[str, ...]) -> None:
    classes = {name: MetadataCatalog.get(name).get("thing_classes") for name in names}
    message = class_mismatch({f"{n!r} ({source_file(n)})": c for n, c in classes.items() if c})
    if message:
        raise ValueError(message)


def class_mismatch(sources: dict[str, list[str]]) -> str:
    """The first difference between the class names of data sets, "" if there is none."""
    for source, classes in sources.items():
        first, expected = next(iter(sources.items()))
        if classes != expected:
            pairs = zip([*expected, "nothing"], [*classes, "nothing"])
            index, (a, b) = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
            return (
                f"data sets {first} and {source} must have the same classes in the same "
                f"order, but they have {len(expected)} and {len(classes)}; "
                f"class {index} is {a!r} in one and {b!r} in the other"
            )
    return ""
