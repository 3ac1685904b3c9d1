"""A local page on which objects are found by clicks: ``solo-d2 click-page --help``."""

from .command import main

__all__ = ["main"]
