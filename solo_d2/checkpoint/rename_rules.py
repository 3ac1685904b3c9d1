"""Renaming the tensors of other projects to our names, with the tables in ``sources``.

A name without a rule is an error; no name is guessed.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

import torch

from solo_d2.errors import UserError

from .sources import SOURCES, Rule, Source

Value = TypeVar("Value")


def recognize(names: Iterable[str]) -> Source | None:
    """The first layout whose signature matches one of the names; None if there is none."""
    names = list(names)
    for source in SOURCES.values():
        patterns = (source.signature, source.also_has)
        if all(any(re.match(pattern, name) for name in names) for pattern in patterns):
            return source
    return None


def find_new_name(name: str, rules: Sequence[Rule]) -> str | None:
    """Our name for ``name``; None if it has no rule."""
    for pattern, template in rules:
        match = re.fullmatch(pattern, name)
        if match:
            return match.expand(template)
    return None


def is_dropped(name: str, source: Source) -> bool:
    """Whether the layout's table lists this tensor as one that our models do not have."""
    return any(re.fullmatch(pattern, name) for pattern in source.dropped)


def join(state_dict: Mapping[str, Value], source: Source) -> dict[str, Value]:
    """The same tensors, after concatenating those that the layout stores in several pieces."""
    joined: dict[str, Value] = {}
    pieces: dict[str, list[str]] = {}
    for name, value in state_dict.items():
        whole = find_new_name(name, source.joined)
        if whole is None:
            joined[name] = value
        else:
            pieces.setdefault(whole, []).append(name)
    for whole, names in pieces.items():
        names.sort(key=lambda name: [int(number) for number in re.findall(r"\d+", name)])
        joined[whole] = torch.cat([state_dict[name] for name in names])
    return joined


def convert(state_dict: Mapping[str, Value], source: Source | None = None) -> dict[str, Value]:
    """The same tensors under our names, without those that the layout's table drops.

    Args:
        state_dict: name -> tensor.
        source: their layout; None: recognize it from the names.

    Raises:
        UserError: the layout is unknown, a name has no rule, or two tensors get the same name.
    """
    source = source or recognize(state_dict)
    if source is None:
        raise UserError(f"the names match none of the layouts {', '.join(SOURCES)}")
    state_dict = join(state_dict, source)
    origin: dict[str, str] = {}
    unused = []
    for name in state_dict:
        if is_dropped(name, source):
            continue
        renamed = find_new_name(name, source.rules)
        if renamed is None:
            unused.append(name)
        elif renamed in origin:
            raise UserError(f"both {origin[renamed]} and {name} would be renamed to {renamed}")
        else:
            origin[renamed] = name
    if unused:
        raise UserError(f"unused, layout {source.name} has no such names: {', '.join(unused)}")
    return {renamed: state_dict[name] for renamed, name in origin.items()}
