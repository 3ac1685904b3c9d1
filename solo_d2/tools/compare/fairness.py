"""Where the configs of a comparison differ, and whether they may."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from detectron2.config import CfgNode

from solo_d2.errors import UserError

# What may differ besides MODEL, and why. The rest of a config is data, schedule and evaluation.
ALLOWED = {
    "INPUT.KEEP_CROWD": "whether crowd regions reach the model, which ignores what it finds there",
    "INPUT.FORMAT": "the order of the colors that the weights were trained with",
    "INPUT.CROP.SINGLE_CATEGORY_MAX_AREA": "PointRend's key, not looked at for instances",
    "INPUT.COLOR_AUG_SSD": "PointRend's key, not looked at for instances",
    "DATALOADER.NUM_WORKERS": "no influence on the result",
    "SOLVER.CHECKPOINT_PERIOD": "no influence on the result",
    "TEST.EVAL_PERIOD": "no influence on the final model",
    "TEST.BEST_METRIC": "no influence on the final model",
    "TEST.VIS_IMAGES": "no influence on the result",
    "TEST.VIS_SCORE_THRESH": "no influence on the result",
    "VIS_PERIOD": "no influence on the result",
}
# Below MODEL, what is no property of an architecture: a study should have it equal.
BACKBONE = ("MODEL.BACKBONE.", "MODEL.FPN.", "MODEL.WEIGHTS", "MODEL.PIXEL_")
# Likewise, where the backbone's name has the word.
BACKBONES = {
    "MODEL.RESNETS.": "resnet",
    "MODEL.MOBILENETV2.": "mobilenetv2",
    "MODEL.VOVNET.": "vovnet",
    "MODEL.DARKNET.": "darknet",
    "MODEL.UNET.": "unet",
}
# What only a training looks at.
TRAINING = (
    *("SOLVER.", "DATALOADER.", "SEED", "DATASETS.TRAIN", "DATASETS.PROPOSAL_FILES_TRAIN"),
    *("DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TRAIN", "DATASETS.CUSTOM.TRAIN_", "INPUT.MIN_SIZE_TRAIN"),
    *("INPUT.MAX_SIZE_TRAIN", "INPUT.CROP.", "INPUT.RANDOM_FLIP", "INPUT.AUGMENTATION"),
    *("INPUT.MASK_FORMAT", "TEST.PRECISE_BN."),
)
# Set by the comparison itself, or only the layout of the file.
_IGNORED = {"OUTPUT_DIR", "VERSION"}
_GROUPS = ("forbidden", "backbone", "listed", "rates", "stages", "model", "evaluation only")


class Difference(NamedTuple):
    """A config key that has not the same value in all models."""

    key: str
    values: dict[str, Any]  # by model
    group: str  # one of _GROUPS
    reason: str

    @property
    def allowed(self) -> bool:
        return self.group != "forbidden"


def flatten(cfg: CfgNode, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value, with lists for tuples, as json has them."""
    flat: dict[str, Any] = {}
    for key, value in cfg.items():
        if isinstance(value, CfgNode):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = _plain(value)
    return flat


def find_differences(
    models: Mapping[str, Sequence[CfgNode]], *, training: bool, rates: bool = False
) -> list[Difference]:
    """All differences between configs, the forbidden ones first.

    A model that is trained in stages is compared by its first stage, and by the iterations of all
    of them together; that later stages differ from the first is part of its method.

    Args:
        models: by name the configs of its stages, before data sets are registered.
        training: whether they are trained; else what only a training looks at may differ.
        rates: whether each model is trained with several learning rates; theirs may differ.
    """
    stages = {name: [_comparable(cfg) for cfg in cfgs] for name, cfgs in models.items()}
    first = {name: _total(flats) for name, flats in stages.items()}
    differences = []
    for key in sorted(set().union(*first.values())):
        values = {name: flat.get(key) for name, flat in first.items()}
        within = {
            name: _join(flats, key)
            for name, flats in stages.items()
            if any(flat.get(key) != flats[0].get(key) for flat in flats)
        }
        if any(value != values[next(iter(values))] for value in values.values()):
            group, reason = _judge(key, list(first.values()), training=training)
            if rates and key == "SOLVER.BASE_LR":
                group, reason = "rates", "each model is trained with each of --lrs"
        elif within and key != "MODEL.WEIGHTS":
            group, reason = "stages", "the model is trained in stages"
        else:
            continue
        differences.append(Difference(key, values | within, group, reason))
    return sorted(differences, key=lambda x: (_GROUPS.index(x.group), x.key))


def check_fair(differences: Sequence[Difference], *, allow: bool = False) -> None:
    """
    Args:
        differences: of the configs.
        allow: forbidden ones too, unless they are of the data that models are evaluated on.

    Raises:
        UserError: a difference is forbidden; the message names all of them.
    """
    forbidden = [x for x in differences if not x.allowed]
    remedy = "Give all models one value (KEY VALUE), or --allow-differences"
    if allow:
        forbidden = [x for x in forbidden if x.key.startswith("DATASETS.") and "TRAIN" not in x.key]
        remedy = "All models must be evaluated on the same data"
    if forbidden:
        found = "; ".join(describe(x) for x in forbidden)
        raise UserError(f"the configs differ outside of MODEL: {found}. {remedy}")


def describe(difference: Difference) -> str:
    """The key and its values, equal ones together."""
    groups: dict[str, list[str]] = {}
    for model, value in difference.values.items():
        groups.setdefault(str(value), []).append(model)
    values = ", ".join(f"{value} ({', '.join(names)})" for value, names in groups.items())
    return f"{difference.key} is {values}"


def architecture(cfg: CfgNode) -> str:
    """The name that its users know: an R-CNN is called after its heads."""
    name = cfg.MODEL.META_ARCHITECTURE
    if name != "GeneralizedRCNN":
        return name
    if cfg.MODEL.PROPOSAL_GENERATOR.NAME == "FCOSProposalGenerator":
        return "CenterMask" if cfg.MODEL.MASK_ON else "FCOS"
    if "POINT_HEAD" in cfg.MODEL:
        return "PointRend"
    return "Mask R-CNN" if cfg.MODEL.MASK_ON else "Faster R-CNN"


def images_seen(cfgs: Sequence[CfgNode]) -> int:
    """By all stages of a training."""
    return sum(cfg.SOLVER.MAX_ITER * cfg.SOLVER.IMS_PER_BATCH for cfg in cfgs)


def _comparable(cfg: CfgNode) -> dict[str, Any]:
    return {k: v for k, v in flatten(cfg).items() if k not in _IGNORED}


def _total(stages: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return stages[0] | {"SOLVER.MAX_ITER": sum(flat["SOLVER.MAX_ITER"] for flat in stages)}


def _join(stages: Sequence[dict[str, Any]], key: str) -> str:
    sign = " + " if key == "SOLVER.MAX_ITER" else ", then "
    return sign.join(str(flat.get(key)) for flat in stages)


def _judge(key: str, models: Sequence[dict[str, Any]], *, training: bool) -> tuple[str, str]:
    """(group, reason) of a key that differs between models."""
    backbones = {flat["MODEL.BACKBONE.NAME"] for flat in models}
    word = next((word for prefix, word in BACKBONES.items() if key.startswith(prefix)), "-")
    if key.startswith(BACKBONE) or any(word in name for name in backbones):
        return "backbone", "part of the model, but no property of its architecture"
    if key.startswith("MODEL.") and key != "MODEL.DEVICE":
        return "model", "the model is what is compared"
    if key in ALLOWED:
        return "listed", ALLOWED[key]
    if not training and key.startswith(TRAINING):
        return "evaluation only", "nothing is trained here"
    return "forbidden", "data, schedule and evaluation must be the same for all"


def _plain(value: Any) -> Any:
    return [_plain(x) for x in value] if isinstance(value, list | tuple) else value
