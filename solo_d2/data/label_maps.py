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
from .catalog import DATASETS_HINT, Loader, check_images_exist, datasets_folder, enter

_VOC = "voc_2012_sem_seg_"


def record_label_map(record: dict[str, Any]) -> NDArray[np.uint8]:
    """(H, W): the annotations of a data set record, painted, or else its file.

    Raises:
        OSError, ValueError: the record has neither, or they cannot be used.
    """
    if "annotations" in record:
        return paint_label_map(record["annotations"], record["height"], record["width"])
    if "sem_seg_file_name" not in record:
        raise ValueError("it has neither annotations nor a label map (sem_seg_file_name)")
    return read_label_map(record["sem_seg_file_name"])


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
    """PASCAL VOC 2012: the images of a list in ImageSets/Segmentation, and their label maps."""

    def __call__(self) -> list[dict[str, Any]]:
        """
        Raises:
            FileNotFoundError: the list, an image or a label map is missing.
        """
        root, split = datasets_folder() / "VOC2012", self.name.removeprefix(_VOC)
        names = root / "ImageSets" / "Segmentation" / f"{split}.txt"
        if not names.is_file():
            raise FileNotFoundError(f"data set {self.name!r}: no file {names}. {DATASETS_HINT}")
        label_maps = root / ("SegmentationClassAug" if "aug" in split else "SegmentationClass")
        records = [
            {
                "image_id": name,
                "file_name": str(root / "JPEGImages" / f"{name}.jpg"),
                "sem_seg_file_name": str(label_maps / f"{name}.png"),
            }
            for name in names.read_text().split()
        ]
        check_images_exist(records, self.name)
        check_images_exist([{"file_name": r["sem_seg_file_name"]} for r in records], self.name)
        return records


def register_voc_label_maps() -> None:
    """Register voc_2012_sem_seg_{train_aug,train,val}, unless the names are taken.

    They are in $DETECTRON2_DATASETS/VOC2012; train_aug has its label maps in SegmentationClassAug.
    """
    for split in ("train_aug", "train", "val"):
        if (name := f"{_VOC}{split}") not in DatasetCatalog:
            names = {"thing_classes": [*CLASS_NAMES], "stuff_classes": ["background", *CLASS_NAMES]}
            loader = VocLoader(name)
            enter(loader, ignore_label=UNLABELED, **names)
            loader.set_metadata(evaluator_type="sem_seg")
