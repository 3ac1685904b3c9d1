"""Checkpoints: safe loading, atomic saving, and conversion of other projects' files."""

from .checkpointer import Checkpointer, build_checkpointer
from .load import load_weights_file

__all__ = ["Checkpointer", "build_checkpointer", "load_weights_file"]
