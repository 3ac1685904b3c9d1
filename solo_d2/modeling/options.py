"""Checks of constructor arguments."""

from collections.abc import Sequence
from typing import Any


def check_choice(name: str, value: Any, allowed: Sequence[Any]) -> None:
    """Raise ValueError if the argument does not have one of the allowed values."""
    if value not in allowed:
        choices = ", ".join(map(str, allowed))
        raise ValueError(f"{name} must be one of {choices}, not {value!r}")


def check_at_least(lowest: float, **options: float) -> None:
    """Raise ValueError if an argument is NaN or less than ``lowest``."""
    for name, value in options.items():
        if not value >= lowest:
            raise ValueError(f"{name} must be at least {lowest}, not {value!r}")


def check_fractions(**options: float) -> None:
    """Raise ValueError if an argument is not from 0 to 1."""
    for name, value in options.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must be from 0 to 1, not {value!r}")


def check_channels(norm: str, **options: int) -> None:
    """Raise ValueError if no layer with this norm can have that number of channels."""
    step = 32 if norm == "GN" else 1  # Detectron2's group norm has 32 groups
    for name, value in options.items():
        if value < 1 or value % step:
            allowed = f"a multiple of {step}, the groups of its norm" if step > 1 else "positive"
            raise ValueError(f"{name} must be {allowed}, not {value!r}")
