"""Checks of constructor arguments."""

from collections.abc import Sequence
from typing import Any


def check_choice(name: str, value: Any, allowed: Sequence[Any]) -> None:
    """Raise ValueError if the argument does not have one of the allowed values."""
    if value not in allowed:
        choices = ", ".join(map(str, allowed))
        raise ValueError(f"{name} must be one of {choices}, not {value!r}")
