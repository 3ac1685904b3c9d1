"""Where the configs of a comparison differ, and whether they may."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from detectron2.config import CfgNode

from solo_d2.errors import UserError

# Groups of differences, in the order of the report; all but the first are allowed.
GROUPS = {
    "forbidden": "Not allowed in a fair comparison",
    "backbone": "The backbone, which is no property of the architecture",
    "other": "Without influence on the result, or what a model's own training needs",
    "model": "The architectures themselves",
}
# What may differ besides MODEL. The rest of a config is data, schedule and evaluation.
_LISTED = (
    "INPUT.FORMAT",
    # PointRend's, which instances do not depend on
    *("INPUT.CROP.SINGLE_CATEGORY_MAX_AREA", "INPUT.COLOR_AUG_SSD"),
    *("DATALOADER.NUM_WORKERS", "SOLVER.CHECKPOINT_PERIOD", "TEST.EVAL_PERIOD"),
    *("TEST.BEST_METRIC", "TEST.VIS_IMAGES", "TEST.VIS_SCORE_THRESH", "VIS_PERIOD"),
)
# Below MODEL, what a study should have equal; so too a section that the name of a backbone has.
_BACKBONE = ("MODEL.BACKBONE.", "MODEL.FPN.", "MODEL.WEIGHTS", "MODEL.PIXEL_")
_BACKBONES = ("RESNETS", "MOBILENETV2", "VOVNET", "DARKNET", "UNET")
# What only a training looks at.
_TRAINING = (
    *("SOLVER.", "DATALOADER.", "SEED", "DATASETS.TRAIN", "DATASETS.PROPOSAL_FILES_TRAIN"),
    *("DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TRAIN", "DATASETS.CUSTOM.TRAIN_", "INPUT.MIN_SIZE_TRAIN"),
    *("INPUT.MAX_SIZE_TRAIN", "INPUT.CROP.", "INPUT.RANDOM_FLIP", "INPUT.AUGMENTATION"),
    *("INPUT.MASK_FORMAT", "TEST.PRECISE_BN."),
)
# Set by the comparison itself, or only the layout of the file.
_IGNORED = {"OUTPUT_DIR", "VERSION"}


class Difference(NamedTuple):
    """A config key that has not the same value in all models."""

    key: str
    values: dict[str, Any]  # by model
    group: str  # of GROUPS

    @property
    def allowed(self) -> bool:
        return self.group != "forbidden"


def flatten(cfg: CfgNode, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value as JSON has it, with lists for tuples."""
    flat: dict[str, Any] = {}
    for key, value in cfg.items():
        if isinstance(value, CfgNode):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = json.loads(json.dumps(value))
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
    stages = {name: [flatten(cfg) for cfg in cfgs] for name, cfgs in models.items()}
    total = "SOLVER.MAX_ITER"
    first = {n: flats[0] | {total: sum(x[total] for x in flats)} for n, flats in stages.items()}
    differences = []
    for key in sorted(set().union(*first.values()) - _IGNORED):
        values = {name: flat.get(key) for name, flat in first.items()}
        sign = " + " if key == total else ", then "
        within = {
            name: sign.join(str(flat.get(key)) for flat in flats)
            for name, flats in stages.items()
            if any(flat.get(key) != flats[0].get(key) for flat in flats)
        }
        if any(value != values[next(iter(values))] for value in values.values()):
            tried = rates and key == "SOLVER.BASE_LR"
            group = "other" if tried else _group(key, first.values(), training=training)
        elif within and key != "MODEL.WEIGHTS":
            group = "other"
        else:
            continue
        differences.append(Difference(key, values | within, group))
    return sorted(differences, key=lambda x: ([*GROUPS].index(x.group), x.key))


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
    if cfg.MODEL.META_ARCHITECTURE != "GeneralizedRCNN":
        return cfg.MODEL.META_ARCHITECTURE
    if cfg.MODEL.PROPOSAL_GENERATOR.NAME == "FCOSProposalGenerator":
        return "CenterMask" if cfg.MODEL.MASK_ON else "FCOS"
    if "POINT_HEAD" in cfg.MODEL:
        return "PointRend"
    return "Mask R-CNN" if cfg.MODEL.MASK_ON else "Faster R-CNN"


def _group(key: str, models: Iterable[dict[str, Any]], *, training: bool) -> str:
    """That of a key which differs between models."""
    names = "".join(flat["MODEL.BACKBONE.NAME"] for flat in models)
    used = tuple(f"MODEL.{x}." for x in _BACKBONES if x.lower().rstrip("s") in names)
    if key.startswith((*_BACKBONE, *used)):
        return "backbone"
    if key.startswith("MODEL.") and key != "MODEL.DEVICE":
        return "model"
    unused = not training and key.startswith(_TRAINING)
    return "other" if unused or key in _LISTED else "forbidden"
