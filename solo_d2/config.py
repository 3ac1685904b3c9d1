"""Configuration keys that solo_d2 adds to Detectron2's defaults."""

import logging
from collections.abc import Sequence

import torch
import yaml
from detectron2.config import CfgNode as CN
from detectron2.config import get_cfg
from detectron2.utils.file_io import PathManager

from .errors import UserError, one_line
from .model_zoo import get_config_file
from .modeling.adaptis.config import add_adaptis_config
from .modeling.backbone.config import add_backbone_config
from .modeling.centermask.config import add_centermask_config
from .modeling.eps.config import add_eps_config
from .modeling.solo.config import add_solo_config
from .modeling.yolact.config import add_yolact_config


def load_config(config_file: str = "", *, data: Sequence[str] = (), opts: Sequence[str] = ()) -> CN:
    """Merge the defaults, a config file, data sets and KEY VALUE pairs, in this order.

    Args:
        config_file: a yaml file, or the name of a packaged one, for example
            "SOLOv2/SOLOv2_R50_3x.yaml"; "" for none. Code in the file is never run.
        data: nothing, or json file and image folder for training, then those for validation.
        opts: config keys, each followed by its value.

    Raises:
        UserError: a file is missing or has an invalid format, a key is unknown, or a value has the
            wrong type.
    """
    cfg = get_cfg()
    add_solo_d2_config(cfg)
    path = config_file
    if config_file and not PathManager.isfile(config_file):
        path = get_config_file(config_file)
    try:
        if path:
            model = _read_yaml(path).get("MODEL")
            if isinstance(model, dict) and "POINT_HEAD" in model:
                add_point_rend_config(cfg)
            cfg.merge_from_file(path, allow_unsafe=False)
        if data:
            custom = cfg.DATASETS.CUSTOM
            custom.TRAIN_JSON, custom.TRAIN_IMAGES, custom.VAL_JSON, custom.VAL_IMAGES = data
        cfg.merge_from_list(list(opts))
    except (KeyError, ValueError, TypeError, AssertionError, OSError, yaml.YAMLError) as error:
        raise UserError(f"config {config_file}: {one_line(error)}") from error
    return cfg


def _read_yaml(path: str) -> dict:
    """Read a yaml file merged with its bases, without running code from any of them."""
    try:
        content = CN.load_yaml_with_base(path)
    except yaml.constructor.ConstructorError as error:
        raise ValueError(f"yaml tags for Python objects are not allowed: {error}") from error
    except RecursionError as error:
        raise ValueError("it is its own _BASE_, or is nested too deeply") from error
    except (TypeError, AttributeError):
        content = None
    if not isinstance(content, dict):
        raise ValueError("it is not a mapping of keys to values")
    return content


def use_available_device(cfg: CN) -> None:
    """Set MODEL.DEVICE to the CPU, with a warning, if it is CUDA and CUDA is not available."""
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        logging.getLogger(__name__).warning("CUDA is not available: running on the CPU")
        cfg.MODEL.DEVICE = "cpu"


def add_point_rend_config(cfg: CN) -> None:
    """Add the keys of PointRend, which Detectron2 ships as a project, and register its heads."""
    from detectron2.projects.point_rend import add_pointrend_config

    add_pointrend_config(cfg)


# Keys in the config.yaml of older runs: ignored with a warning.
_DEPRECATED = (
    "INPUT.KEEP_CROWD",  # now a property of the architecture
    "MODEL.EPS.CROP_SIZE",  # INPUT.AUGMENTATION "eps" with INPUT.CROP.SIZE
    "MODEL.EPS.HEAD_LR_FACTOR",  # SOLVER.BACKBONE_MULTIPLIER
    "MODEL.ADAPTIS.BACKBONE_LR_FACTOR",  # SOLVER.BACKBONE_MULTIPLIER
)


def add_solo_d2_config(cfg: CN) -> None:
    """Add every key of solo_d2 to ``cfg``, in place. Call it before ``cfg.merge_from_file``."""
    _add_data(cfg)
    _add_input(cfg)
    _add_training(cfg)
    add_backbone_config(cfg)
    add_solo_config(cfg)
    add_adaptis_config(cfg)
    add_centermask_config(cfg)
    add_yolact_config(cfg)
    add_eps_config(cfg)
    for key in _DEPRECATED:
        cfg.register_deprecated_key(key)


def _add_data(cfg: CN) -> None:
    # Your own COCO-format data. When TRAIN_JSON or VAL_JSON is set, the sets are registered as
    # "<NAME>_train" / "<NAME>_val" and replace DATASETS.TRAIN / DATASETS.TEST. A relative path that
    # does not exist is looked up under $DETECTRON2_DATASETS as well.
    cfg.DATASETS.CUSTOM = CN()
    cfg.DATASETS.CUSTOM.NAME = "custom"
    cfg.DATASETS.CUSTOM.TRAIN_JSON = ""
    cfg.DATASETS.CUSTOM.TRAIN_IMAGES = ""
    cfg.DATASETS.CUSTOM.VAL_JSON = ""
    cfg.DATASETS.CUSTOM.VAL_IMAGES = ""
    # Treat annotations with "iscrowd": 1 as single objects: brush tools write every mask so.
    cfg.DATASETS.CUSTOM.CROWD_IS_OBJECT = False

    # Overfitting check: train and evaluate on the first N images of DATASETS.TRAIN that contain
    # objects (0 = off).
    cfg.DATASETS.OVERFIT_IMAGES = 0

    # The embedded data set, "shapes_train" and "shapes_val", which is drawn on first use.
    cfg.DATASETS.SHAPES = CN()
    cfg.DATASETS.SHAPES.TRAIN_IMAGES = 2000
    cfg.DATASETS.SHAPES.VAL_IMAGES = 200
    # Height and width in pixels.
    cfg.DATASETS.SHAPES.IMAGE_SIZE = (128, 128)
    cfg.DATASETS.SHAPES.SEED = 0


def _add_input(cfg: CN) -> None:
    # "default": Detectron2's (CROP, resize, RANDOM_FLIP). "ssd": CROP, the augmentation of SSD with
    # YOLACT's parameters (photometric, expand, crop), RANDOM_FLIP, resize; an image that loses all
    # of its objects is replaced by another one. "cityscapes": CROP, resize, RANDOM_FLIP, then
    # AdaptIS's for Cityscapes (shift and rotation, a crop of 400 x 720, colors); an image that
    # loses all of its objects is replaced with probability 0.95. "eps": that of EPS, with a longer
    # side from MODEL.EPS.LONG_SIDES, RANDOM_FLIP, colors, and a crop or padding to CROP.SIZE.
    cfg.INPUT.AUGMENTATION = "default"


def _add_training(cfg: CN) -> None:
    # "SGD" as in Detectron2, or "AdamW" with the same parameter groups.
    cfg.SOLVER.OPTIMIZER = "SGD"
    # Factor on the learning rate of the backbone.
    cfg.SOLVER.BACKBONE_MULTIPLIER = 1.0
    # Maximum L2 norm of all gradients together (0 = no limit). SOLVER.CLIP_GRADIENTS limits each
    # parameter separately.
    cfg.SOLVER.CLIP_TOTAL_GRAD_NORM = 0.0
    # The metric that selects model_best.pth. "": the model's main metric ("segm/AP", "bbox/AP"
    # without masks, "panoptic_seg/PQ" of panoptic models), on the first test set if there are
    # several. To choose another test set, write "<name>/segm/AP".
    cfg.TEST.BEST_METRIC = ""
    # Stop after this many evaluations in a row without improvement (0 = train to the end).
    cfg.TEST.PATIENCE = 0
    # After each evaluation, draw this many test images with ground truth and prediction.
    cfg.TEST.VIS_IMAGES = 8
    # Predictions below this score are not drawn.
    cfg.TEST.VIS_SCORE_THRESH = 0.3
