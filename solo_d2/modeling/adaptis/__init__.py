from .adaptis import AdaptIS
from .predictor import AdaptISPredictor

__all__ = ["AdaptIS", "AdaptISPredictor"]
