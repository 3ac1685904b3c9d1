"""From what ``solo_d2.load`` is given to a config and weights."""

from collections.abc import Sequence
from pathlib import Path

from detectron2.config import CfgNode

from solo_d2.config import load_config
from solo_d2.errors import UserError
from solo_d2.modeling.num_classes import get_value, num_classes_keys

from .architecture import match_configs
from .load import load_weights_file

MODELS = Path(__file__).resolve().parents[1] / "models"  # trained models in the package


def find_config(
    source: str | Path | CfgNode, weights: str, opts: Sequence[str]
) -> tuple[CfgNode, str]:
    """(config, weights or "") for the arguments of ``load``, which has the errors, too."""
    if isinstance(source, CfgNode):
        cfg = source.clone()
        cfg.defrost()
        cfg.merge_from_list(list(opts))
    else:
        path = _packaged_model(source) or Path(source)
        if path.is_dir():
            source = path / "config.yaml"
            weights = weights or _last_weights(path)
        elif path.suffix not in (".yaml", ".yml"):
            if weights:
                raise UserError(f"{path} is not a config, so weights {weights} do not go with it")
            if not path.exists():
                raise UserError(
                    f"no run folder, checkpoint or config {path}, nor a packaged model "
                    f"({', '.join(packaged_models())})"
                )
            source, weights = path.parent / "config.yaml", str(path)
            if not source.is_file():
                source = _packaged_config(path)
        cfg = load_config(str(source), opts=opts)
    return cfg, weights or cfg.MODEL.WEIGHTS


def packaged_models() -> list[str]:
    """Names of the trained models in the package, for ``load``."""
    return sorted(path.parent.name for path in MODELS.glob("*/config.yaml"))


def _packaged_model(source: str | Path) -> Path | None:
    """The folder of a packaged model, unless there is a run folder with that name."""
    if str(source) in packaged_models() and not Path(source, "config.yaml").exists():
        return MODELS / source
    return None


def _packaged_config(file: Path) -> str:
    """Name of the packaged config that a checkpoint without config.yaml belongs to."""
    checkpoint = load_weights_file(file)
    architecture = (checkpoint.get("solo_d2") or {}).get("architecture")
    advice = f"there is no config.yaml beside {file}; give its config, and {file} as weights"
    if architecture is None:
        raise UserError(advice)
    shapes = {
        name: tuple(tensor.shape)
        for name, tensor in checkpoint["model"].items()
        if not name.endswith(".num_batches_tracked")
    }
    fitting = [match for match in match_configs(shapes, architecture) if not match.differences]
    models = {_inference_settings(match.config()) for match in fitting}
    if len(models) != 1:
        names = ", ".join(match.name for match in fitting)
        raise UserError(f"{advice}. It fits {names or 'no packaged one'}")
    return fitting[0].name


def _inference_settings(cfg: CfgNode) -> str:
    """The settings, besides the weights, that predictions depend on."""
    model = cfg.MODEL.clone()
    model.WEIGHTS = model.DEVICE = ""
    model.SOLO.PAD_BEFORE_DOWNSAMPLING = True  # concerns training only
    sizes = (cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST, cfg.INPUT.FORMAT)
    return f"{model} {sizes} {cfg.TEST.DETECTIONS_PER_IMAGE}"


def _last_weights(folder: Path) -> str:
    """The best, the final or the last checkpoint of a training run."""
    last = folder / "last_checkpoint"
    names = ["model_best.pth", "model_final.pth", "model.pth"]
    names += [last.read_text(encoding="utf-8").strip()] if last.is_file() else []
    for name in names:
        if (folder / name).is_file():
            return str(folder / name)
    raise UserError(f"{folder} holds no checkpoint: none of {', '.join(names)}")


def set_num_classes(cfg: CfgNode, number: int, weights: str) -> None:
    """Set the number of classes that the weights were trained for.

    Raises:
        UserError: the config has another one.
    """
    for key in num_classes_keys(cfg):
        configured = get_value(cfg, key)
        if configured not in (-1, number):
            raise UserError(
                f"{key} is {configured}, but {weights} was trained for {number} classes"
            )
        cfg.merge_from_list([key, number])
