"""The output formats: pictures and videos, COCO json, masks with ids."""

import importlib.util
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
from PIL import Image

from solo_d2.data.label_maps import write_label_map
from solo_d2.errors import UserError
from solo_d2.files import atomic_write
from solo_d2.images import UnreadableError
from solo_d2.predictor import Result

from .inputs import Source


class Output(ABC):
    """Base class: receives the results of one source after another."""

    def __init__(self, folder: Path, score: float):
        """
        Args:
            folder: the output folder.
            score: instances with lower scores are omitted, except by ``CocoResults``.
        """
        self.folder = folder
        self.score = score

    @abstractmethod
    def add(self, source: Source, target: Path, result: Result) -> None:
        """Add an image's result. ``target``: a file name in ``folder`` for it."""

    def add_frame(self, source: Source, number: int, result: Result) -> None:
        """Add the result of a video's frame; ``number`` counts from 0."""
        self.add(source, Path(f"{source.name.as_posix()}#{number}"), result)

    def start_video(self, target: Path, rate: float) -> None:  # noqa: B027
        """Start a video; the frames that follow belong to it."""

    def end_video(self) -> None:  # noqa: B027
        """End the video."""

    def close(self) -> None:  # noqa: B027
        """Finish, after all results or after an error."""


class Pictures(Output):
    """The image with masks, as PNG or JPEG; videos in H.264."""

    def __init__(self, folder: Path, score: float, *, color_by: str, labels: bool):
        super().__init__(folder, score)
        self.style: dict[str, Any] = {"color_by": color_by, "labels": labels}
        self._video: VideoWriter | None = None

    def add(self, source: Source, target: Path, result: Result) -> None:
        path = self.folder / target
        path.parent.mkdir(parents=True, exist_ok=True)
        result.save(path, score_threshold=self.score, **self.style)

    def add_frame(self, source: Source, number: int, result: Result) -> None:
        assert self._video is not None
        self._video.add(result.draw(score_threshold=self.score, **self.style))

    def start_video(self, target: Path, rate: float) -> None:
        self._video = VideoWriter(self.folder / target, rate)

    def end_video(self) -> None:
        if self._video is not None:
            self._video.close()
        self._video = None


class VideoWriter:
    """An .mp4 file in H.264, which browsers play."""

    def __init__(self, path: Path, rate: float):
        import av

        path.parent.mkdir(parents=True, exist_ok=True)
        self._av = av
        self._container = av.open(str(path), "w")
        self._stream = self._container.add_stream(
            "libx264", rate=Fraction(rate).limit_denominator(1000)
        )
        self._stream.pix_fmt = "yuv420p"  # the only format that all players support
        self._size: tuple[int, int] | None = None

    def add(self, image_rgb: np.ndarray) -> None:
        height, width = image_rgb.shape[:2]
        if self._size is None:
            self._size = (height, width)
            # H.264 stores colors at half the size, so both sides must be even.
            self._stream.height, self._stream.width = height + height % 2, width + width % 2
        elif self._size != (height, width):
            raise UnreadableError(
                f"a frame is {width} x {height}, the first one was of another size"
            )
        padded = np.pad(image_rgb, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        frame = self._av.VideoFrame.from_ndarray(padded, format="rgb24")
        self._container.mux(self._stream.encode(frame))

    def close(self) -> None:
        if self._size is not None:
            self._container.mux(self._stream.encode())  # flush the encoder
        self._container.close()


def check_video_writer() -> None:
    """
    Raises:
        UserError: PyAV, which writes videos, is not installed.
    """
    if importlib.util.find_spec("av") is None:
        raise UserError("videos need PyAV; run: python -m pip install av")


class CocoResults(Output):
    """coco_results.json for ``COCO.loadRes`` with all instances, and images.json for ``COCO``."""

    def __init__(self, folder: Path, score: float):
        super().__init__(folder, score)
        self.images: list[dict[str, Any]] = []
        self.results: list[dict[str, Any]] = []
        self.categories: list[dict[str, Any]] = []

    def add(self, source: Source, target: Path, result: Result) -> None:
        file_name = str(target) if source.is_video else source.name.as_posix()
        self.results += result.to_coco(self._add_image(file_name, result))

    def _add_image(self, file_name: str, result: Result) -> int:
        """Add an image; returns its id, counted from 1."""
        height, width = result.image.shape[:2]
        image = {"id": len(self.images) + 1, "file_name": file_name}
        self.images.append({**image, "height": height, "width": width})
        self.categories = [
            {"id": i, "name": n} for i, n in zip(result.category_ids, result.names, strict=True)
        ]
        return len(self.images)

    def _data_set(self, annotations: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return {
            "info": {"description": "predicted by solo_d2"},
            "images": self.images,
            "annotations": list(annotations),
            "categories": self.categories,
        }

    def close(self) -> None:
        _write_json(self.folder / "images.json", self._data_set([]))
        _write_json(self.folder / "coco_results.json", self.results)


class CocoDataset(CocoResults):
    """annotations.json, a data set to train on or to correct by hand.

    Image names are relative to the folder that contains all of them.
    """

    def __init__(self, folder: Path, score: float, root: Path):
        super().__init__(folder, score)
        self.root = root

    def add(self, source: Source, target: Path, result: Result) -> None:
        file_name = Path(source.location).resolve().relative_to(self.root).as_posix()
        image_id = self._add_image(file_name, result)
        for found in result.to_coco(image_id):
            if found["score"] < self.score:
                continue
            left, top, width, height = found["bbox"]
            area = width * height
            if "segmentation" in found:
                area = int(mask_util.area(found["segmentation"]))
                left, top, width, height = mask_util.toBbox(found["segmentation"]).tolist()
            if area == 0:
                continue
            annotation = {
                **found,
                "id": len(self.results) + 1,
                "bbox": [left, top, width, height],
                "area": area,
                "iscrowd": 0,
            }
            self.results.append(annotation)

    def close(self) -> None:
        _write_json(self.folder / "annotations.json", self._data_set(self.results))


class IdMasks(Output):
    """<name>.masks.png: 0 is the background, i the instance with the i-th highest score.

    It has 16 bits if there are more than 255 instances.
    """

    def add(self, source: Source, target: Path, result: Result) -> None:
        instances = result.instances
        instances = instances[instances.scores >= self.score]
        instances = instances[instances.scores.argsort(descending=True, stable=True)]
        count = len(instances)
        if count > 65535 or not (instances.has("pred_masks") or count == 0):
            raise UnreadableError("has no masks" if count <= 65535 else f"has {count} instances")
        ids = np.zeros(result.image.shape[:2], np.uint8 if count < 256 else np.uint16)
        for number in range(count, 0, -1):  # a higher score covers a lower one
            ids[np.asarray(instances.pred_masks[number - 1])] = number
        path = self.folder / target.with_name(f"{target.name}.masks.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            Image.fromarray(ids).save(file, format="PNG")


class LabelMaps(Output):
    """<name>.labels.png, indexed: 0 is the background, k + 1 the class k."""

    def add(self, source: Source, target: Path, result: Result) -> None:
        if result.label_map is None:
            raise UserError("--format label-maps needs a model that labels pixels, such as EPS")
        path = self.folder / target.with_name(f"{target.name}.labels.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_label_map(path, result.label_map)


def _write_json(path: Path, content: Any) -> None:
    with atomic_write(path) as file:
        file.write(json.dumps(content).encode())
