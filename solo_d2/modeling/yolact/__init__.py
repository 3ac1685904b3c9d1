from .yolact import YOLACT

__all__ = ["YOLACT"]
