"""Converting a published checkpoint: every tensor finds its place, or an error names it."""

from collections.abc import Mapping

from detectron2.config import CfgNode
from torch import Tensor

from solo_d2.errors import UserError

from .architecture import (
    Match,
    Shapes,
    differing_names,
    fit_num_classes,
    match_configs,
    model_shapes,
)
from .rename_rules import convert
from .sources import Source


def find_configs(weights: Mapping[str, Tensor], source: Source) -> list[Match]:
    """The packaged configs that a published state dict fits.

    Args:
        weights: a published state dict.
        source: its layout.

    Raises:
        UserError: it fits none; the message names the closest one and the tensors that differ.
    """
    shapes = _shapes(convert(weights, source))
    matches = match_configs(
        shapes, source.architecture or "", lacking=source.lacking, settings=source.settings
    )
    nearest = matches[0]
    if nearest.differences:
        try:
            _check(shapes, source, nearest.config())
        except UserError as error:
            raise UserError(
                f"fits no packaged config; compared with {nearest.name}, {error}"
            ) from None
    return matches


def convert_checkpoint(
    weights: Mapping[str, Tensor], source: Source, cfg: CfgNode
) -> dict[str, Tensor]:
    """Rename the tensors and compare them, one by one, with those of the model of ``cfg``.

    Args:
        weights: a published state dict.
        source: its layout.
        cfg: config of the model; its number of classes must be that of the weights.

    Raises:
        UserError: tensors are unused or missing, or have another shape; all are named.
    """
    converted = convert(weights, source)
    _check(_shapes(converted), source, cfg)
    return {name: tensor.contiguous() for name, tensor in converted.items()}


def num_classes_for(weights: Mapping[str, Tensor], source: Source, cfg: CfgNode) -> int:
    """The number of classes that a published state dict has in the model of ``cfg``."""
    return fit_num_classes(cfg, _shapes(convert(weights, source)))


def _shapes(weights: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in weights.items()}


def _check(shapes: Shapes, source: Source, cfg: CfgNode) -> None:
    expected = model_shapes(cfg)
    missing, unused = differing_names(shapes, expected, source.lacking)
    other = [
        f"{name} is {shape}, the model has {expected[name]}"
        for name, shape in shapes.items()
        if expected.get(name, shape) != shape
    ]
    found = {"missing": missing, "unused": unused, "of another shape": other}
    complaints = [f"{what}: {', '.join(names)}" for what, names in found.items() if names]
    if complaints:
        raise UserError("; ".join(complaints))
