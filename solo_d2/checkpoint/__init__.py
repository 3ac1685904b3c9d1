"""Checkpoints: loading any file safely, saving whole files, converting those of other projects."""

from .checkpointer import Checkpointer, build_checkpointer
from .load import load_weights_file

__all__ = ["Checkpointer", "build_checkpointer", "load_weights_file"]
