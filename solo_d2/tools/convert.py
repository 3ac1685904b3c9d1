"""Turn a published checkpoint into one of solo_d2: ``python -m solo_d2 convert``."""

from solo_d2.checkpoint.convert import main

__all__ = ["main"]
