"""What an exported file says about itself: all that prediction needs beside the graph."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from detectron2.data import transforms as T
from fvcore.transforms.transform import Transform

from solo_d2.errors import UserError

KEY = "solo_d2"


@dataclass(frozen=True)
class Metadata:
    """Stored as json under the key "solo_d2" of the file's metadata."""

    version: str  # of solo_d2
    architecture: str  # which class of ``exported`` reads the outputs
    class_names: list[str]
    category_ids: list[int]  # of the classes, as in the COCO json of the data set
    channel_order: str  # "RGB" or "BGR"
    pixel_mean: list[float]  # per channel, in that order; images are padded with it
    pixel_std: list[float]
    divisibility: int  # height and width of the input are multiples of this
    size: list[int] | None  # height and width of the input where there is only one
    # {"shortest_edge": n, "max_size": n}: see ``ResizeShortestEdge`` (0: no resize);
    # {"fit": [H, W]}: as large as fits; {"stretch": [H, W]}: exactly this.
    resize: dict[str, Any]
    options: dict[str, Any]  # of the architecture: thresholds, and limits of the graph
    inputs: list[str]
    outputs: list[str]

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str, path: str) -> "Metadata":
        """
        Raises:
            UserError: the file was not exported by solo_d2, or by another version's format.
        """
        try:
            return cls(**json.loads(text))
        except (ValueError, TypeError):
            raise UserError(
                f"{path}: no file of solo_d2 export, or one of another version; export it again"
            ) from None

    def augmentation(self) -> T.Augmentation:
        """Brings an image to the size that the graph takes."""
        if "fit" in self.resize:
            return Fit(*self.resize["fit"])
        if "stretch" in self.resize:
            return T.Resize(self.resize["stretch"])
        edge, longest = self.resize["shortest_edge"], self.resize["max_size"]
        return T.ResizeShortestEdge(edge, longest)


class Fit(T.Augmentation):
    """The largest size of the same aspect ratio within a height and a width."""

    def __init__(self, height: int, width: int):
        super().__init__()
        self.height, self.width = height, width

    def get_transform(self, image: Any) -> Transform:
        h, w = image.shape[:2]
        scale = min(self.height / h, self.width / w)
        new_h, new_w = (max(1, round(scale * length)) for length in (h, w))
        return T.ResizeTransform(h, w, new_h, new_w)


def decoder_path(path: str | Path) -> Path:
    """Of AdaptIS' decoder, beside its encoder."""
    path = Path(path)
    return path.with_name(f"{path.stem}.decoder{path.suffix}")


def round_up(length: int, multiple: int) -> int:
    """The next multiple."""
    return -(-length // multiple) * multiple
