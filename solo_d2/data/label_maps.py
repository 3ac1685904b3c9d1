"""Label maps: painted from annotations, read from and written to PNG files.

0 is the background, k + 1 the class k, and 255 is not labeled.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
from detectron2.data import DatasetCatalog
from detectron2.data.datasets.pascal_voc import CLASS_NAMES
from detectron2.utils.file_io import PathManager
from numpy.typing import NDArray
from PIL import Image

from solo_d2.files import atomic_write
from solo_d2.modeling.eps.targets import UNLABELED

from .annotations import to_rle
from .catalog import DATASETS_HINT, Loader, datasets_folder, enter


def record_label_map(record: dict[str, Any]) -> NDArray[np.uint8]:
    """(H, W): the file of a data set record, or its annotations, painted.

    Raises:
        OSError, ValueError: the record has neither, or they cannot be used.
    """
    if "sem_seg_file_name" in record:
        return read_label_map(record["sem_seg_file_name"])
    if "annotations" not in record:
        raise ValueError("it has neither a label map (sem_seg_file_name) nor annotations")
    return paint_label_map(record["annotations"], record["height"], record["width"])


def paint_label_map(
    annotations: Sequence[dict[str, Any]], height: int, width: int
) -> NDArray[np.uint8]:
    """Smaller objects over larger ones, and all of them over crowds, which are not labeled.

    Args:
        annotations: in Detectron2's format, with masks.
        height, width: of the image.

    Raises:
        ValueError: an annotation has no mask.
    """
    label_map = np.zeros((height, width), np.uint8)
    masks = []
    for annotation in annotations:
        if "segmentation" not in annotation:
            raise ValueError("an annotation has no mask (segmentation)")
        rle = to_rle(annotation["segmentation"], height, width)
        crowd = annotation.get("iscrowd", 0)
        value = UNLABELED if crowd else annotation["category_id"] + 1
        masks.append((not crowd, -int(mask_util.area(rle)), value, rle))
    for _, _, value, rle in sorted(masks, key=lambda mask: mask[:2]):
        label_map[mask_util.decode(rle).astype(bool)] = value
    return label_map


def read_label_map(path: str | Path) -> NDArray[np.uint8]:
    """(H, W): the indices of a PNG with a palette, or the values of a gray one.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not such a PNG.
    """
    try:
        with PathManager.open(str(path), "rb") as file, Image.open(file) as image:
            if image.mode not in ("L", "P"):
                raise ValueError(f"its mode is {image.mode}, not 8 bits of gray or a palette")
            return np.array(image)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise ValueError(f"label map {path}: {error}") from error


def write_label_map(path: str | Path, label_map: NDArray[np.uint8]) -> None:
    """Write a PNG whose pixels are the labels, with the colors of PASCAL VOC."""
    image = Image.fromarray(label_map)
    image.putpalette(_voc_palette().tobytes())
    with atomic_write(path) as file:
        image.save(file, format="PNG")


def _voc_palette() -> NDArray[np.uint8]:
    """(256, 3): three bits of the index at a time become the highest free bits of R, G and B."""
    index = np.arange(256)[:, None]
    bits = [(index >> (3 * i + np.arange(3)) & 1) << (7 - i) for i in range(8)]
    return np.sum(bits, axis=0).astype(np.uint8)


class VocLoader(Loader):
    """Images and label maps that a list of PASCAL VOC 2012 names."""

    def __init__(self, name: str, split: str, label_maps: str):
        """
        Args:
            name: name of the data set.
            split: a list in ImageSets/Segmentation.
            label_maps: the folder of PNG files.
        """
        super().__init__(name)
        self.split = split
        self.label_maps = label_maps

    def __call__(self) -> list[dict[str, Any]]:
        """
        Raises:
            FileNotFoundError: the list, an image or a label map is missing.
        """
        root = datasets_folder() / "VOC2012"
        names = root / "ImageSets" / "Segmentation" / f"{self.split}.txt"
        if not names.is_file():
            raise FileNotFoundError(f"data set {self.name!r}: no file {names}. {DATASETS_HINT}")
        records = [
            {
                "image_id": name,
                "file_name": str(root / "JPEGImages" / f"{name}.jpg"),
                "sem_seg_file_name": str(root / self.label_maps / f"{name}.png"),
            }
            for name in names.read_text().split()
        ]
        files = [r[key] for r in records for key in ("file_name", "sem_seg_file_name")]
        check_exist(files, f"data set {self.name!r}")
        return records


def check_exist(files: Sequence[str], source: str) -> None:
    """
    Args:
        files: paths.
        source: what names them.

    Raises:
        FileNotFoundError: some do not exist; they are counted, and the first ten named.
    """
    missing = [file for file in files if not Path(file).is_file()]
    if missing:
        more = f" and {len(missing) - 10} more" if len(missing) > 10 else ""
        raise FileNotFoundError(
            f"{source}: {len(missing)} of {len(files)} files are missing: "
            f"{', '.join(missing[:10])}{more}"
        )


def register_voc_label_maps() -> None:
    """Register voc_2012_sem_seg_{train_aug,train,val}, unless the names are taken.

    They are read from $DETECTRON2_DATASETS/VOC2012. train_aug is the list of 10,582 images, with
    the label maps in SegmentationClassAug.
    """
    for split, folder in (
        ("train_aug", "SegmentationClassAug"),
        ("train", "SegmentationClass"),
        ("val", "SegmentationClass"),
    ):
        loader = VocLoader(f"voc_2012_sem_seg_{split}", split, folder)
        if loader.name not in DatasetCatalog:
            classes = [*CLASS_NAMES]
            enter(
                loader,
                thing_classes=classes,
                stuff_classes=["background", *classes],
                ignore_label=UNLABELED,
            )
            loader.set_metadata(evaluator_type="sem_seg")
