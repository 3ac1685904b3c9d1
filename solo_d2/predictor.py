"""Prediction in three lines: ``load`` a model, ``predict`` an image, ``save`` the picture."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.data import transforms as T
from detectron2.modeling import build_model
from detectron2.structures import Instances
from PIL import Image
from torch import nn

from .checkpoint.checkpointer import Checkpointer
from .checkpoint.find import find_config, set_num_classes
from .checkpoint.load import load_weights_file
from .config import use_available_device
from .drawing import draw_instances, draw_points
from .errors import UserError
from .export.exported import SUFFIXES, open_exported
from .files import atomic_write
from .images import MAX_PIXELS, as_rgb
from .modeling import AdaptISPredictor
from .modeling.adaptis import ObjectFinder
from .modeling.num_classes import dataset_num_classes, get_value, num_classes_keys
from .modeling.own_keys import all_keys_honored
from .modeling.prepare import precision, prepare_for_inference


@dataclass(frozen=True)
class Result:
    """The instances found in one image.

    Attributes:
        image: (H, W, 3) uint8, RGB.
        instances: on the CPU, at the size of the image.
        names: names of all classes.
        category_ids: ids of all classes, as in the COCO json of the data set.
        points: x and y of the points passed to ``click``.
        label_map: of a model that labels pixels, (H, W) uint8: 0 is the background, k + 1 the class
            k. Its regions are the instances.
    """

    image: np.ndarray
    instances: Instances
    names: list[str]
    category_ids: list[int]
    points: Sequence[tuple[float, float]] = ()
    label_map: np.ndarray | None = None

    def draw(
        self, *, score_threshold: float = 0.3, color_by: str = "instance", labels: bool = True
    ) -> np.ndarray:
        """The image with its instances, (H, W, 3) uint8, RGB; see ``drawing.draw_instances``.

        Instances found by ``click`` are drawn regardless of their scores.
        """
        drawn = draw_instances(
            self.image,
            self.instances,
            self.names,
            color_by=color_by,
            labels=labels,
            score_threshold=0.0 if len(self.points) else score_threshold,
        )
        return draw_points(drawn, self.points) if len(self.points) else drawn

    def save(
        self,
        path: str | Path,
        *,
        score_threshold: float = 0.3,
        color_by: str = "instance",
        labels: bool = True,
    ) -> None:
        """Write the picture of ``draw`` as PNG, or as JPEG if the name ends in .jpg or .jpeg."""
        drawn = self.draw(score_threshold=score_threshold, color_by=color_by, labels=labels)
        is_jpeg = Path(path).suffix.lower() in (".jpg", ".jpeg")
        with atomic_write(path) as file:
            Image.fromarray(drawn).save(file, format="JPEG" if is_jpeg else "PNG", quality=92)

    def to_coco(self, image_id: int = 1) -> list[dict[str, Any]]:
        """All instances as COCO results, with masks in RLE."""
        from detectron2.evaluation.coco_evaluation import instances_to_coco_json  # slow to import

        results = instances_to_coco_json(self.instances, image_id)
        for result in results:
            result["category_id"] = self.category_ids[result["category_id"]]
        return results


class Predictor:
    """A model that accepts images of any kind and size; ``load`` creates one.

    Attributes:
        model: the module, in eval mode.
        names: class names.
        category_ids: ids of the classes, as in the COCO json of the data set.
        max_pixels: larger images are refused; 0: no limit.
        resize, input_format: how ``network_input`` resizes an image and orders its channels.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        resize: T.Augmentation,
        input_format: str,
        names: Sequence[str],
        category_ids: Sequence[int] | None = None,
        max_pixels: int = MAX_PIXELS,
        dtype: str | torch.dtype = torch.float32,
    ):
        """
        Args:
            model: any model with Detectron2's interface that returns "instances".
            resize: resizes an image as the model expects it.
            input_format: "RGB" or "BGR", the channel order that the model expects.
            names: class names.
            category_ids: 1, 2, ... by default.
            max_pixels: see the class.
            dtype: "bfloat16" or "float16": run convolutions and products in this type, see
                ``precision``; results are float32.

        Raises:
            ValueError: an argument has an unsupported value.
        """
        if input_format not in ("RGB", "BGR"):
            raise ValueError(f"input_format is {input_format!r}, not 'RGB' or 'BGR'")
        self.model = model.eval()
        self.names = list(names)
        self.category_ids = list(category_ids or range(1, len(self.names) + 1))
        self.max_pixels = max_pixels
        self.resize = resize
        self.input_format = input_format
        self.dtype = dtype
        parameter = next(self.model.parameters(), None)  # an exported model has none
        self._device = "cpu" if parameter is None else parameter.device.type
        self._precision()  # checks dtype
        self._points: AdaptISPredictor | None = None
        self._image: np.ndarray | None = None

    @property
    def takes_points(self) -> bool:
        """Whether ``set_image`` and ``click`` work."""
        return isinstance(self.model, ObjectFinder)

    @overload
    def predict(self, image: list | tuple) -> list[Result]: ...
    @overload
    def predict(self, image: str | Path | Image.Image | np.ndarray) -> Result: ...
    def predict(self, image: Any) -> Result | list[Result]:
        """Find the instances of an image, or of each in a list.

        Args:
            image: a path, a PIL image or an RGB array (H, W, 3) of uint8, or a list of these.

        Raises:
            UnreadableError: an image cannot be read, is too large, or is of another kind.
        """
        if isinstance(image, list | tuple):
            return [self._predict_one(x) for x in image]
        return self._predict_one(image)

    def _predict_one(self, image: Any) -> Result:
        pixels = as_rgb(image, max_pixels=self.max_pixels)
        height, width = pixels.shape[:2]
        inputs = {"image": self.network_input(pixels), "height": height, "width": width}
        with torch.no_grad(), self._precision():
            (output,) = self.model([inputs])
        if hasattr(self.model, "to_regions"):
            label_map, instances = self.model.to_regions(output["sem_seg"].cpu())
            return replace(self._result(pixels, instances), label_map=label_map.numpy())
        if "instances" not in output:
            raise UserError(f"{type(self.model).__name__} predicts no instances")
        return self._result(pixels, output["instances"])

    def set_image(self, image: Any) -> None:
        """Embed an image once, for any number of calls of ``click``. AdaptIS only.

        Args:
            image: see ``predict``.

        Raises:
            UserError: the model takes no points, or the image cannot be read.
        """
        if not self.takes_points:
            raise UserError(f"points need an AdaptIS model, not {type(self.model).__name__}")
        if self._points is None:
            self._points = AdaptISPredictor(
                self.model, resize=self.resize, input_format=self.input_format
            )
        self._image = None  # a bad image must not leave the previous one set
        image = as_rgb(image, max_pixels=self.max_pixels)
        with self._precision():
            self._points.set_image(image)
        self._image = image

    def click(self, points: Any, labels: Sequence[int] | None = None) -> Result:
        """Find the object at each point of the current image; one instance per point, in order.

        Args:
            points: x and y in pixels of the image; one point or a list of points.
            labels: None, or for each point 1 (on the object) or 0 (not on it). With labels, all
                points refer to one object, and there is one instance.

        Raises:
            UserError: no image is set.
            ValueError: a point is outside the image, or a label has an unsupported value.
        """
        if self._points is None or self._image is None:
            raise UserError("no image is set; call set_image first")
        pairs = np.atleast_2d(np.asarray(points, dtype=np.float64))
        with self._precision():
            found = self._points.predict(pairs, labels)
        return self._result(self._image, found, [(x, y) for x, y in pairs.tolist()])

    def _result(
        self, image: np.ndarray, instances: Instances, points: Sequence[tuple[float, float]] = ()
    ) -> Result:
        found = instances.to("cpu")
        for name, value in found.get_fields().items():
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                found.set(name, value.float())
        return Result(image, found, self.names, self.category_ids, points)

    def _precision(self) -> torch.autocast:
        return precision(self._device, self.dtype)

    def network_input(self, image_rgb: np.ndarray) -> torch.Tensor:
        """What the model takes for an image (H, W, 3): (3, H', W') float32."""
        image = image_rgb if self.input_format == "RGB" else image_rgb[:, :, ::-1]
        transform = self.resize.get_transform(image)
        if isinstance(transform, T.ResizeTransform):
            # a very elongated image would be resized to a side of 0 pixels
            transform.new_h, transform.new_w = max(1, transform.new_h), max(1, transform.new_w)
        image = transform.apply_image(image).transpose(2, 0, 1)
        return torch.as_tensor(np.ascontiguousarray(image), dtype=torch.float32)


def load(
    source: str | Path | CfgNode,
    *,
    weights: str | Path = "",
    opts: Sequence[str] = (),
    allow_pickle: bool = False,
    dtype: str | torch.dtype = torch.float32,
) -> Predictor:
    """Load a trained model.

    Args:
        source: the output folder of a training run, a checkpoint, a file written by
            ``solo-d2 export``, the name of a packaged model such as "nuclei", or a config: a yaml
            file, the name of a packaged one, or a config object, which is not modified. For a
            checkpoint, the config is config.yaml in its folder, or else the packaged config whose
            model has the same tensors.
        weights: a checkpoint; by default that of the folder, or MODEL.WEIGHTS of the config.
        opts: config keys, each followed by its value.
        allow_pickle: load weights that may run code; only for files that you trust.
        dtype: see ``Predictor``; an exported file runs in the type that it was exported with.

    Raises:
        UserError: a file is missing or invalid, the weights do not fit the model or are incomplete,
            or the number of classes is unknown.
        ValueError: the config or ``dtype`` has an unsupported value.
    """
    for path in (source, weights):
        if not isinstance(path, CfgNode) and Path(path).suffix in SUFFIXES:
            if path is weights or weights or opts:
                raise UserError(f"{path} is exported with its config; give it without another one")
            if dtype not in ("float32", torch.float32):
                raise UserError(f"{path} is exported: it cannot run in {dtype}")
            return load_exported(path, allow_pickle=allow_pickle)
    cfg, file = find_config(source, str(weights), opts)
    if not file:
        raise UserError(f"no weights: pass them, or set MODEL.WEIGHTS in the config ({source})")
    use_available_device(cfg)
    checkpoint = load_weights_file(file, allow_pickle=allow_pickle)
    names = _trained_names(checkpoint)
    metadata = _dataset_metadata(cfg, needed=names is None)
    if names is not None:
        set_num_classes(cfg, len(names), file)
        # The data set of the config may have other classes, or not be on this machine.
        cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ()
    elif metadata is not None:
        names = list(metadata.thing_classes)
    with all_keys_honored():
        model = build_model(cfg)
    Checkpointer(model, thing_classes=names, require_complete=True, allow_pickle=allow_pickle).load(
        file
    )
    precision(torch.device(cfg.MODEL.DEVICE).type, dtype)  # checks it
    prepare_for_inference(model, dtype)
    return Predictor(
        model,
        resize=T.ResizeShortestEdge(cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST),
        input_format=cfg.INPUT.FORMAT,
        names=names or [str(i) for i in range(get_value(cfg, num_classes_keys(cfg)[0]))],
        category_ids=_category_ids(metadata, names),
        dtype=dtype,
    )


def load_exported(path: str | Path, *, allow_pickle: bool = False) -> Predictor:
    """Load a file of ``solo-d2 export``; arguments and errors are those of ``open_exported``."""
    model = open_exported(path, allow_pickle=allow_pickle)
    return Predictor(
        model,
        resize=model.metadata.augmentation(),
        input_format=model.metadata.channel_order,
        names=model.metadata.class_names,
        category_ids=model.metadata.category_ids,
    )


def _trained_names(checkpoint: dict[str, Any]) -> list[str] | None:
    stored = checkpoint.get("solo_d2")
    names = stored.get("thing_classes") if isinstance(stored, dict) else None
    return None if names is None else [str(name) for name in names]


def _dataset_metadata(cfg: CfgNode, *, needed: bool) -> Any:
    """Metadata with class names of the config's data; None if they are unknown."""
    if needed:
        try:
            dataset_num_classes(cfg)  # loads a set that is registered but not loaded yet
        except (ValueError, OSError):
            pass  # unknown, or not on this machine: the config may give the number
    for name in (*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN):
        if MetadataCatalog.get(name).get("thing_classes"):
            return MetadataCatalog.get(name)
    return None


def _category_ids(metadata: Any, names: list[str] | None) -> list[int] | None:
    """Ids of the classes in the data set, if the model has its classes."""
    if metadata is None or list(metadata.thing_classes) != names:
        return None
    to_contiguous = metadata.get("thing_dataset_id_to_contiguous_id") or {}
    return sorted(to_contiguous, key=to_contiguous.__getitem__)
