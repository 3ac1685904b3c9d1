"""Masks on images and videos: ``solo-d2 predict --help``."""

from .command import main

__all__ = ["main"]
