"""The format of a table of tensor names."""

import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

# A pattern for the whole name in the file, and the template of our name.
Rule = tuple[str, str]

# The number of batches that a norm has seen; inference does not read it.
COUNTERS = r".*\.num_batches_tracked"


class Source(NamedTuple):
    """A layout of tensor names."""

    name: str
    # Pattern for the beginning of a name that only files of this layout have.
    signature: str
    # Applied in order: the first rule whose pattern matches gives the name.
    rules: Sequence[Rule]
    # Several tensors that form one of ours: they are concatenated along their first
    # dimension, in the order of the numbers in their names. The rules then rename the result.
    joined: Sequence[Rule] = ()
    # Patterns for whole names of tensors that our models do not have.
    dropped: Sequence[str] = ()
    # Patterns for whole names of ours that files of this layout lack; for training state only.
    lacking: Sequence[str] = ()
    # Pattern for the beginning of another name that a file must have to be of this layout.
    also_has: str = ""
    # Meta-architecture; None for the weights of a backbone alone.
    architecture: str | None = None
    # Config keys that the weights need and that their shapes do not determine.
    settings: Mapping[str, Any] = MappingProxyType({})


def moved(source: str, target: str, rules: Sequence[Rule]) -> tuple[Rule, ...]:
    """The same rules for names with the prefix ``source``; our names get the prefix ``target``."""
    return tuple((re.escape(source) + pattern, target + to) for pattern, to in rules)
