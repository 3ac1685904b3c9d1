"""What a table of names is made of."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

# A pattern for the whole of their name, and the template of ours.
Rule = tuple[str, str]

# No inference reads the number of batches that a norm has seen.
COUNTERS = r".*\.num_batches_tracked"


class Source(NamedTuple):
    """A layout of tensor names."""

    name: str
    # Pattern for the beginning of those names that no other layout has.
    signature: str
    # The first whose pattern matches counts.
    rules: Sequence[Rule]
    # Tensors that are to be one, joined along their first dimension in the order of the number in
    # their names, and their name for it, which then has its rule.
    joined: Sequence[Rule] = ()
    # Patterns of whole names that have no place in our models.
    dropped: Sequence[str] = ()
    # Patterns of whole names of ours that no file of this layout has: state of training only.
    lacking: Sequence[str] = ()
    # Meta-architecture; None for the weights of a backbone alone.
    architecture: str | None = None
    # Config keys that the weights need and that their shapes cannot tell.
    settings: Mapping[str, Any] = {}


def moved(source: str, target: str, rules: Sequence[Rule]) -> tuple[Rule, ...]:
    """The same rules for names that begin with ``source``; ours then begin with ``target``."""
    return tuple((re.escape(source) + pattern, target + to) for pattern, to in rules)
