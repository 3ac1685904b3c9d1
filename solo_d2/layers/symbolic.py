"""Sizes that are plain numbers in eager mode, and symbols while torch.export records a graph."""

from collections.abc import Sequence
from typing import Any

import torch


def is_exporting() -> bool:
    """Whether torch.export runs this; PyTorch before 2.7 does not tell."""
    return hasattr(torch.compiler, "is_exporting") and torch.compiler.is_exporting()


def refuse_export(name: str) -> None:
    """
    Raises:
        ValueError: torch.export records a whole model, which selects by counts that depend on the
            image.
    """
    if is_exporting():
        raise ValueError(f"torch.export cannot record {name}; run: python -m solo_d2 export --help")


def same_size(a: Sequence[int], b: Sequence[int]) -> bool:
    """Whether two sizes are equal; while exporting, whether they are for every input size."""
    if not is_exporting():
        return tuple(a) == tuple(b)
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return all(statically_known_true(x == y) for x, y in zip(a, b))


def larger(a: Any, b: Any) -> Any:
    """The maximum of two sizes, without a decision that the graph would be limited to."""
    return torch.sym_max(a, b) if is_exporting() else max(a, b)
