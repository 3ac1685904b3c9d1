"""Panoptic pictures as annotations of instances, and the augmentation of AdaptIS for Cityscapes."""

from collections.abc import Container
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
from detectron2.data import transforms as T
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager
from PIL import Image

_CROP = (400, 720)


def read_segment_ids(file: str) -> np.ndarray:
    """(H, W) int64 ids of a panoptic picture of COCO's format, which Cityscapes has too."""
    with PathManager.open(file, "rb") as opened:
        rgb = np.asarray(Image.open(opened).convert("RGB"), dtype=np.int64)
    return rgb @ np.array([1, 256, 256**2])


def panoptic_annotations(record: dict[str, Any], things: Container[int]) -> list[dict[str, Any]]:
    """Annotations of a record that has a panoptic picture instead.

    Args:
        record: with "pan_seg_file_name" and "segments_info".
        things: the "category_id" of things, for segments without "isthing".

    Raises:
        OSError: the picture cannot be read.
    """
    ids = read_segment_ids(record["pan_seg_file_name"])
    annotations = []
    for segment in record["segments_info"]:
        # COCO says which segments are things, and numbers stuff from 0 too; Cityscapes does neither
        if segment.get("isthing", segment["category_id"] in things):
            rle = mask_util.encode(np.asfortranarray(ids == segment["id"], dtype=np.uint8))
            annotations.append(
                {
                    "category_id": segment["category_id"],
                    "iscrowd": segment.get("iscrowd", 0),
                    "segmentation": rle,
                    "bbox": mask_util.toBbox(rle).tolist(),
                    "bbox_mode": BoxMode.XYWH_ABS,
                }
            )
    return annotations


def cityscapes_augmentations() -> list[T.Augmentation]:
    """Shift and rotate, crop to 400 x 720, change colors, as AdaptIS was trained on Cityscapes."""
    return [ShiftAndRotate(), T.RandomCrop("absolute", _CROP), StreetColors()]


class ShiftAndRotate(T.Augmentation):
    """With probability 3/4, shift by up to 3 % and rotate by up to 3 degrees; fill with zeros."""

    def get_transform(self, image: np.ndarray) -> T.Transform:
        height, width = image.shape[:2]
        if self._rand_range() >= 0.75:
            return T.NoOpTransform()
        angle = float(self._rand_range(-3, 3))
        right, down = np.round(self._rand_range(-0.03, 0.03, 2) * (width, height)).astype(int)
        return T.TransformList(
            [
                T.PadTransform(max(right, 0), max(down, 0), max(-right, 0), max(-down, 0)),
                T.CropTransform(max(-right, 0), max(-down, 0), width, height),
                T.RotationTransform(height, width, angle, expand=False),
            ]
        )


class StreetColors(T.Augmentation):
    """With probability 3/4 each: contrast and brightness, and a shift of each channel."""

    def get_transform(self, image: np.ndarray) -> T.Transform:
        gain, offset = 1.0, np.zeros(image.shape[2])
        if self._rand_range() < 0.75:
            gain = self._rand_range(0.85, 1.4)
            offset += 255 * self._rand_range(-0.25, 0.25)
        if self._rand_range() < 0.75:
            offset += self._rand_range(-10, 10, image.shape[2])
        return T.ColorTransform(lambda x: np.clip(x * gain + offset, 0, 255).astype(x.dtype))
