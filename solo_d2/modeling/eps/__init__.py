"""EPS: label maps learned from image labels and saliency maps."""

from .eps import EPS

__all__ = ["EPS"]
