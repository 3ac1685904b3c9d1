"""How other projects name their tensors, and our names for the same: a table per project."""

from . import solo, torchvision, yolact
from .source import Rule, Source

SOURCES = {source.name: source for source in (*solo.SOURCES, *torchvision.SOURCES, *yolact.SOURCES)}

__all__ = ["SOURCES", "Rule", "Source"]
