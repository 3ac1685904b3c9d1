"""Comparing the tensors of a file with those of a model, and describing the differences."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

Shape = tuple[int, ...]


def belongs(
    fitting: Mapping[str, Tensor], weights: Mapping[str, Tensor], model: Mapping[str, Tensor]
) -> bool:
    """Whether a file is for this model: a head tensor fits, or half of the file or the backbone.

    Args:
        fitting: tensors of the file, without those that have another shape in the model.
        weights: all tensors of the file.
        model: state dict of the model.
    """
    placed = [name for name in fitting if name in model]
    if any(not name.startswith("backbone.") for name in placed):
        return True
    backbone = [tensor for name, tensor in model.items() if name.startswith("backbone.")]
    half = min(sum(t.numel() for t in tensors) for tensors in (backbone, weights.values())) / 2
    return bool(placed) and sum(model[name].numel() for name in placed) >= half


def describe_shapes(shapes: Mapping[str, tuple[Shape, Shape]], in_file: int, in_model: int) -> str:
    """Name the tensors with different shapes, and the numbers of classes if these are the reason.

    Args:
        shapes: name -> shapes in the file and in the model.
        in_file, in_model: numbers of classes; 0: unknown.
    """
    in_file = in_file or _num_classes(shapes, in_model)
    reason = ""
    if in_file and in_model and in_file != in_model:
        reason = f"the file is for {in_file} classes, the model for {in_model}; "
    each = [f"{name} {theirs} instead of {ours}" for name, (theirs, ours) in shapes.items()]
    return f"{reason}different shapes: {listed(each)}"


def _num_classes(shapes: Mapping[str, tuple[Shape, Shape]], in_model: int) -> int:
    """The number of classes that the file is for; 0 if that does not explain its shapes."""
    # The outputs for the classes are the smallest tensors that depend on their number.
    theirs, ours = min(shapes.values(), key=lambda pair: sum(pair[1]))
    if not in_model or not theirs or theirs[1:] != ours[1:]:
        return 0
    if ours[0] == in_model + 1:  # a last output for the background
        return theirs[0] - 1
    per_class, rest = divmod(ours[0], in_model)  # several outputs per class: anchors or boxes
    return 0 if rest or theirs[0] % per_class else theirs[0] // per_class


def wrong_types(found: Any, own: Any, name: str) -> Iterator[str]:
    """What a saved state has of another type than the own state has under the same name.

    Args:
        found: a state dict from a file, or an entry of one.
        own: what it would replace; an entry that is None says nothing about types.
        name: of it, for the messages.
    """
    if own is None:
        return
    if isinstance(own, Mapping) and isinstance(found, Mapping):
        for key in own.keys() & found.keys():
            yield from wrong_types(found[key], own[key], f"{name}.{key}")
    elif isinstance(own, list) and isinstance(found, list):
        if len(own) != len(found):
            yield f"{name} has {len(found)} entries, not {len(own)}"
        for index, pair in enumerate(zip(found, own)):
            yield from wrong_types(*pair, f"{name}[{index}]")
    elif not isinstance(found, (int, float) if type(own) is float else type(own)):
        yield f"{name} is of type {type(found).__name__}, not {type(own).__name__}"


def nonfinite(weights: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that have an infinite or NaN value."""
    return [
        name
        for name, tensor in weights.items()
        if tensor.is_floating_point() and not tensor.isfinite().all()
    ]


def listed(items: Sequence[str]) -> str:
    """The first ten of the items, and how many more there are."""
    rest = len(items) - 10
    return ", ".join(items[:10]) + (f" and {rest} more" if rest > 0 else "")


def counted(names: Sequence[str]) -> str:
    """How many tensors of each part of a model: "12 of head, 3 of mask_branch"."""
    parts = Counter(name.split(".")[0] for name in names)
    return ", ".join(f"{count} of {part}" for part, count in parts.items())
