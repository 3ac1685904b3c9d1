"""Prediction in three lines: ``load`` a model, ``predict`` an image, ``save`` the picture."""

from collections.abc import Sequence
from dataclasses import dataclass
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

from .checkpoint.architecture import match_configs
from .checkpoint.checkpointer import Checkpointer
from .checkpoint.load import load_weights_file
from .config import load_config, use_available_device
from .drawing import draw_instances, draw_points
from .errors import UserError
from .export.exported import SUFFIXES, open_exported
from .files import atomic_write
from .images import MAX_PIXELS, as_rgb
from .modeling import AdaptISPredictor
from .modeling.adaptis import ObjectFinder
from .modeling.num_classes import dataset_num_classes, get_value, num_classes_keys
from .modeling.own_keys import all_keys_honored
from .modeling.prepare import prepare

_MODELS = Path(__file__).resolve().parent / "models"


@dataclass(frozen=True)
class Result:
    """The instances found in one image.

    Attributes:
        image: (H, W, 3) uint8, RGB.
        instances: on the CPU, at the size of the image.
        names: names of all classes.
        category_ids: ids of all classes, as in the COCO json of the data set.
        points: x and y of the points passed to ``click``.
    """

    image: np.ndarray
    instances: Instances
    names: list[str]
    category_ids: list[int]
    points: Sequence[tuple[float, float]] = ()

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
    ):
        """
        Args:
            model: any model with Detectron2's interface that returns "instances".
            resize: resizes an image as the model expects it.
            input_format: "RGB" or "BGR", the channel order that the model expects.
            names: class names.
            category_ids: 1, 2, ... by default.
            max_pixels: see the class.
        """
        if input_format not in ("RGB", "BGR"):
            raise ValueError(f"input_format is {input_format!r}, not 'RGB' or 'BGR'")
        self.model = model.eval()
        self.names = list(names)
        self.category_ids = list(category_ids or range(1, len(self.names) + 1))
        self.max_pixels = max_pixels
        self.resize = resize
        self.input_format = input_format
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
        with torch.no_grad():
            (output,) = self.model([inputs])
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
        found = self._points.predict(pairs, labels)
        return self._result(self._image, found, [(x, y) for x, y in pairs.tolist()])

    def _result(
        self, image: np.ndarray, instances: Instances, points: Sequence[tuple[float, float]] = ()
    ) -> Result:
        return Result(image, instances.to("cpu"), self.names, self.category_ids, points)

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

    Raises:
        UserError: a file is missing or invalid, the weights do not fit the model or are incomplete,
            or the number of classes is unknown.
        ValueError: the config has an unsupported value.
    """
    for path in (source, weights):
        if not isinstance(path, CfgNode) and Path(path).suffix in SUFFIXES:
            if path is weights or weights or opts:
                raise UserError(f"{path} is exported with its config; give it without another one")
            return load_exported(path, allow_pickle=allow_pickle)
    cfg, file = _find(source, str(weights), opts)
    if not file:
        raise UserError(f"no weights: pass them, or set MODEL.WEIGHTS in the config ({source})")
    use_available_device(cfg)
    checkpoint = load_weights_file(file, allow_pickle=allow_pickle)
    names = _trained_names(checkpoint)
    metadata = _dataset_metadata(cfg, needed=names is None)
    if names is not None:
        _set_num_classes(cfg, len(names), file)
        # The data set of the config may have other classes, or not be on this machine.
        cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ()
    elif metadata is not None:
        names = list(metadata.thing_classes)
    with all_keys_honored():
        model = prepare(build_model(cfg)).eval()
    Checkpointer(model, thing_classes=names, require_complete=True, allow_pickle=allow_pickle).load(
        file
    )
    ids = None
    if metadata is not None and list(metadata.thing_classes) == names:
        to_contiguous = metadata.get("thing_dataset_id_to_contiguous_id") or {}
        ids = sorted(to_contiguous, key=to_contiguous.__getitem__)
    return Predictor(
        model,
        resize=T.ResizeShortestEdge(cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST),
        input_format=cfg.INPUT.FORMAT,
        names=names or [str(i) for i in range(get_value(cfg, num_classes_keys(cfg)[0]))],
        category_ids=ids,
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


def _find(source: str | Path | CfgNode, weights: str, opts: Sequence[str]) -> tuple[CfgNode, str]:
    """(config, weights) for the arguments of ``load``."""
    if isinstance(source, CfgNode):
        cfg = source.clone()
        cfg.defrost()
        cfg.merge_from_list(list(opts))
    else:
        path = _packaged_model(source) or Path(source)
        if path.is_dir():
            source = path / "config.yaml"
            weights = weights or _last_weights(path)
        elif path.suffix not in (".yaml", ".yml"):
            if weights:
                raise UserError(f"{path} is not a config, so weights {weights} do not go with it")
            if not path.exists():
                raise UserError(
                    f"no run folder, checkpoint or config {path}, nor a packaged model "
                    f"({', '.join(packaged_models())})"
                )
            source, weights = path.parent / "config.yaml", str(path)
            if not source.is_file():
                source = _packaged_config(path)
        cfg = load_config(str(source), opts=opts)
    return cfg, weights or cfg.MODEL.WEIGHTS


def packaged_models() -> list[str]:
    """Names of the trained models in the package, for ``load``."""
    return sorted(path.parent.name for path in _MODELS.glob("*/config.yaml"))


def _packaged_model(source: str | Path) -> Path | None:
    """The folder of a packaged model, unless there is a run folder with that name."""
    if str(source) in packaged_models() and not Path(source, "config.yaml").exists():
        return _MODELS / source
    return None


def _packaged_config(file: Path) -> str:
    """Name of the packaged config that a checkpoint without config.yaml belongs to."""
    checkpoint = load_weights_file(file)
    architecture = (checkpoint.get("solo_d2") or {}).get("architecture")
    advice = f"there is no config.yaml beside {file}; give its config, and {file} as weights"
    if architecture is None:
        raise UserError(advice)
    shapes = {
        name: tuple(tensor.shape)
        for name, tensor in checkpoint["model"].items()
        if not name.endswith(".num_batches_tracked")
    }
    fitting = [match for match in match_configs(shapes, architecture) if not match.differences]
    models = {_inference_settings(match.config()) for match in fitting}
    if len(models) != 1:
        names = ", ".join(match.name for match in fitting)
        raise UserError(f"{advice}. It fits {names or 'no packaged one'}")
    return fitting[0].name


def _inference_settings(cfg: CfgNode) -> str:
    """The settings, besides the weights, that predictions depend on."""
    model = cfg.MODEL.clone()
    model.WEIGHTS = model.DEVICE = ""
    model.SOLO.PAD_BEFORE_DOWNSAMPLING = True  # concerns training only
    sizes = (cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST, cfg.INPUT.FORMAT)
    return f"{model} {sizes} {cfg.TEST.DETECTIONS_PER_IMAGE}"


def _last_weights(folder: Path) -> str:
    """The best, the final or the last checkpoint of a training run."""
    last = folder / "last_checkpoint"
    names = ["model_best.pth", "model_final.pth", "model.pth"]
    names += [last.read_text(encoding="utf-8").strip()] if last.is_file() else []
    for name in names:
        if (folder / name).is_file():
            return str(folder / name)
    raise UserError(f"{folder} holds no checkpoint: none of {', '.join(names)}")


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


def _set_num_classes(cfg: CfgNode, number: int, weights: str) -> None:
    for key in num_classes_keys(cfg):
        configured = get_value(cfg, key)
        if configured not in (-1, number):
            raise UserError(
                f"{key} is {configured}, but {weights} was trained for {number} classes"
            )
        cfg.merge_from_list([key, number])
