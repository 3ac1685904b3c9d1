"""Masks on images and videos: ``python -m solo_d2 predict --help``."""

from solo_d2.data.images import read_image

from .command import main

__all__ = ["main", "read_image"]
