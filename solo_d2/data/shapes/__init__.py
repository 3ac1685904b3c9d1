"""The embedded data set."""

from .dataset import ensure_shapes, generate_shapes, register_shapes

__all__ = ["ensure_shapes", "generate_shapes", "register_shapes"]
