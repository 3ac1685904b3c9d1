"""Tables that map other projects' tensor names to ours, one file per project."""

from . import adaptis, centermask, eps, solo, torchvision, yolact
from .source import Rule, Source

SOURCES = {
    source.name: source
    for project in (adaptis, centermask, eps, solo, torchvision, yolact)
    for source in project.SOURCES
}

__all__ = ["SOURCES", "Rule", "Source"]
