"""From a data set record to an example with image labels and a saliency map."""

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import DatasetCatalog
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from detectron2.modeling import META_ARCH_REGISTRY
from PIL import Image
from torchvision.transforms import ColorJitter

from solo_d2.errors import UserError, one_line
from solo_d2.modeling.eps.targets import label_map_classes, multi_hot
from solo_d2.modeling.num_classes import num_classes_keys, resolve_num_classes
from solo_d2.modeling.options import check_choice

from .augmentation import WindowTransform, build_augmentations
from .catalog import check_images_exist, find_path
from .images import read_image
from .label_maps import paint_label_map, read_label_map
from .mapper import InstanceMapper


def build_mapper(cfg: CfgNode, is_train: bool) -> Any:
    """The mapper for the model of ``cfg``."""
    architecture = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)
    weak = getattr(architecture, "trains_on_image_labels", False)
    return (ImageLabelMapper if weak else InstanceMapper)(cfg, is_train=is_train)


class ImageLabelMapper:
    """Supplies "image", "image_labels" (C,) and for training "saliency" (1, H, W).

    The labels are those of the whole image, even if it is cropped: "image_labels" of the record, or
    else the classes of its annotations, or else of its label map. Without a folder of saliency
    maps, the example has the label map as "sem_seg" (H, W), from which the model makes a stand-in.
    """

    @configurable
    def __init__(
        self,
        is_train: bool,
        *,
        augmentations: Sequence[T.Augmentation | T.Transform],
        image_format: str,
        num_classes: int,
        use_saliency: bool = True,
        saliency_folder: Path | None = None,
    ):
        """
        Args:
            is_train: also supply the saliency.
            augmentations: applied in order, to the image and the saliency together.
            image_format: see ``read_image``.
            num_classes: C.
            use_saliency: False: the model has no use for it.
            saliency_folder: has <name of the image>.png for each image.
        """
        self.is_train = is_train
        self.augmentations = T.AugmentationList(augmentations)
        self.image_format = image_format
        self.num_classes = num_classes
        self.use_saliency = use_saliency
        self.saliency_folder = saliency_folder

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        """
        Raises:
            FileNotFoundError: a saliency map of an image in DATASETS.TRAIN is missing.
            ValueError: a key has an unsupported value.
        """
        options = cfg.MODEL.EPS
        folder = None
        if is_train and options.SALIENCY_LOSS and options.SALIENCY_FOLDER:
            folder = find_path(options.SALIENCY_FOLDER, "MODEL.EPS.SALIENCY_FOLDER")
            sets = [DatasetCatalog.get(name) for name in cfg.DATASETS.TRAIN]
            maps = [saliency_file(folder, r["file_name"]) for records in sets for r in records]
            names = [{"file_name": str(file)} for file in maps]
            check_images_exist(names, "saliency maps (MODEL.EPS.SALIENCY_FOLDER)")
        check_choice("INPUT.AUGMENTATION", cfg.INPUT.AUGMENTATION, ("default", "eps"))
        published = is_train and cfg.INPUT.AUGMENTATION == "eps"
        build = published_augmentations if published else build_augmentations
        return {
            "is_train": is_train,
            "augmentations": build(cfg, is_train),
            "image_format": cfg.INPUT.FORMAT,
            "num_classes": resolve_num_classes(cfg, num_classes_keys(cfg)[0]),
            "use_saliency": options.SALIENCY_LOSS,
            "saliency_folder": folder,
        }

    def __call__(self, record: dict[str, Any]) -> dict[str, Any]:
        """From a record to the model's input.

        Raises:
            UserError: a file or an annotation cannot be used; the message names the image.
        """
        try:
            return self._example(copy.copy(record))
        except (OSError, ValueError) as error:
            raise UserError(f"image {record['file_name']}: {one_line(error)}") from error

    def _example(self, example: dict[str, Any]) -> dict[str, Any]:
        image = read_image(example["file_name"], self.image_format)
        utils.check_image_size(example, image)
        wants_saliency = self.is_train and self.use_saliency
        stands_in = wants_saliency and self.saliency_folder is None
        annotations = example.pop("annotations", None)
        file = example.pop("sem_seg_file_name", None)
        label_map = None
        if annotations is None and file is not None:
            label_map = read_label_map(file)
            _check_size(label_map, image, "label map")
        elif stands_in and annotations is not None:
            label_map = paint_label_map(annotations, *image.shape[:2])
        labels = self._labels(example, annotations, label_map)
        if labels is not None:
            example["image_labels"] = labels
        augmented = T.AugInput(image, sem_seg=label_map if stands_in else None)
        transforms = self.augmentations(augmented)
        # a copy: of one row or column, a flipped view counts as contiguous, which torch refuses
        example["image"] = torch.as_tensor(augmented.image.transpose(2, 0, 1).copy())
        if augmented.sem_seg is not None:
            example["sem_seg"] = torch.as_tensor(augmented.sem_seg.astype("long"))
        elif wants_saliency and self.saliency_folder is not None:
            file = saliency_file(self.saliency_folder, example["file_name"])
            saliency = read_image(file).mean(axis=2).round().astype(np.uint8)
            _check_size(saliency, image, f"saliency map {file}")
            example["saliency"] = torch.as_tensor(_apply(transforms, saliency) / 255).float()[None]
        return example

    def _labels(
        self,
        example: dict[str, Any],
        annotations: list[dict[str, Any]] | None,
        label_map: np.ndarray | None,
    ) -> torch.Tensor | None:
        if "image_labels" in example:
            return torch.as_tensor(example["image_labels"], dtype=torch.float32)
        if annotations is not None:
            classes = [a["category_id"] for a in annotations if not a.get("iscrowd", 0)]
        elif label_map is not None:
            classes = label_map_classes(torch.as_tensor(label_map))
        else:
            return None
        return multi_hot(classes, self.num_classes, example["file_name"])


def saliency_file(folder: Path, image: str) -> Path:
    """The saliency map of an image."""
    return folder / f"{Path(image).stem}.png"


def published_augmentations(cfg: CfgNode, is_train: bool) -> list[T.Augmentation | T.Transform]:
    """Random longer side, flip, color jitter, and a crop or padding; see the keys of MODEL.EPS.

    The padding is 0 after normalization, as published.

    Raises:
        ValueError: a key has an unsupported value.
    """
    size, sides = cfg.INPUT.CROP.SIZE, cfg.MODEL.EPS.LONG_SIDES
    if len(set(size)) != 1 or size[0] < 1 or size[0] != int(size[0]):
        raise ValueError(f"INPUT.CROP.SIZE must be a square in pixels for 'eps', not {size!r}")
    if len(sides) != 2 or not 1 <= sides[0] <= sides[1]:
        raise ValueError(f"MODEL.EPS.LONG_SIDES must be the ends of a range, not {sides!r}")
    if cfg.INPUT.FORMAT != "RGB":
        raise ValueError(f"INPUT.AUGMENTATION 'eps' needs RGB images, not {cfg.INPUT.FORMAT}")
    flips = utils.build_augmentation(cfg, is_train)[1:]
    fill = cfg.MODEL.PIXEL_MEAN
    to_float = T.ColorTransform(_as_float)
    return [ResizeLongSide(*sides), *flips, Jitter(), to_float, RandomWindow(int(size[0]), fill)]


class ResizeLongSide(T.Augmentation):
    """Resize, bicubic, to a longer side from ``low`` to ``high`` pixels."""

    def __init__(self, low: int, high: int):
        super().__init__()
        self._init(locals())

    def get_transform(self, image: np.ndarray) -> T.Transform:
        height, width = image.shape[:2]
        scale = int(self._rand_range(self.low, self.high + 1)) / max(height, width)
        new = [max(1, round(side * scale)) for side in (height, width)]
        return T.ResizeTransform(height, width, *new, Image.Resampling.BICUBIC)


class Jitter(T.Augmentation):
    """torchvision's color jitter with the published strengths, for uint8 RGB images."""

    def get_transform(self, image: np.ndarray) -> T.Transform:
        return T.PILColorTransform(ColorJitter(0.3, 0.3, 0.3, 0.1))


class RandomWindow(T.Augmentation):
    """A square of ``size`` pixels at a random place within the image, or around it."""

    def __init__(self, size: int, fill: Sequence[float]):
        """
        Args:
            size: side in pixels.
            fill: color outside of the image, a number per channel.
        """
        super().__init__()
        self._init(locals())

    def get_transform(self, image: np.ndarray) -> T.Transform:
        free = [side - self.size for side in image.shape[1::-1]]
        x, y = (math.floor(self._rand_range(min(0, n), max(0, n) + 1)) for n in free)
        return WindowTransform(x, y, self.size, self.size, self.fill)


def _as_float(image: np.ndarray) -> np.ndarray:
    return image.astype(np.float32)


def _apply(transforms: T.TransformList, saliency: np.ndarray) -> np.ndarray:
    """Unlike labels, a saliency map is interpolated; unlike images, it has no colors."""
    for t in transforms.transforms:
        apply = t.apply_image if isinstance(t, T.ResizeTransform) else t.apply_segmentation
        saliency = apply(saliency)
    return saliency


def _check_size(array: np.ndarray, image: np.ndarray, name: str) -> None:
    if array.shape != image.shape[:2]:
        (h, w), (height, width) = array.shape, image.shape[:2]
        raise ValueError(f"the {name} is {w} x {h} pixels, but the image {width} x {height}")
