from .adaptis import AdaptIS
from .finder import ObjectFinder
from .predictor import AdaptISPredictor

__all__ = ["AdaptIS", "AdaptISPredictor", "ObjectFinder"]
