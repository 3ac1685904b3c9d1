"""Pictures of predictions, alone or beside the ground truth."""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from detectron2.data.detection_utils import read_image
from detectron2.structures import BoxMode, Instances
from detectron2.utils.visualizer import GenericMask, Visualizer

# Pixels of the grid: space around each panel, height of a caption, largest width of a panel as a
# multiple of its height.
_MARGIN = 4
_CAPTION = 18
_MAX_ASPECT = 2.0
# Panels are drawn larger and then shrunk, for labels that leave small objects visible.
_OVERSAMPLING = 1.5


def draw_instances(
    image_rgb: np.ndarray, instances: Instances, metadata: Any, score_threshold: float
) -> np.ndarray:
    """Draw masks, class names and scores over an image.

    Args:
        image_rgb: (H, W, 3) uint8.
        instances: predictions with ``scores``, ``pred_classes`` and ``pred_masks`` (N, H, W) or
            ``pred_boxes``, on any device.
        metadata: has ``thing_classes``, or else class numbers are written. May be None.
        score_threshold: instances with a lower score are left out.

    Returns:
        (H, W, 3) uint8, RGB.
    """
    return _draw_predictions(image_rgb, instances, metadata, score_threshold, scale=1.0)


def draw_points(image_rgb: np.ndarray, points: Sequence[tuple[float, float]]) -> np.ndarray:
    """Draw dots over an image.

    Args:
        image_rgb: (H, W, 3) uint8; it is not changed.
        points: x and y in pixels, whole numbers being their centers.

    Returns:
        (H, W, 3) uint8, RGB.
    """
    image = np.ascontiguousarray(image_rgb).copy()
    radius = max(1, round(min(image.shape[:2]) / 120))
    for x, y in points:
        center = (round(x), round(y))
        for size, color in ((radius + max(1, radius // 2), (255, 255, 255)), (radius, (0, 0, 0))):
            cv2.circle(image, center, size, color, cv2.FILLED, cv2.LINE_AA)
    return image


def comparison_grid(
    records: Sequence[Mapping[str, Any]],
    predictions: Sequence[Instances | Mapping[str, Instances]],
    metadata: Any,
    *,
    score_threshold: float,
    height: int = 240,
) -> np.ndarray:
    """One row per image: the image, its ground truth, the prediction; above it the file name.

    Args:
        records: Detectron2 dataset dicts; "annotations" may be absent or empty.
        predictions: for each record the ``Instances`` at the image's size, or the model's output
            ``{"instances": Instances}``.
        metadata: of the data set; has ``thing_classes``, or else class numbers are written.
        score_threshold: predictions with a lower score are left out.
        height: of a panel in pixels. Images are scaled to it, keeping their ratio.

    Returns:
        (rows * (height + margins and caption), W, 3) uint8, RGB; without records a blank caption.

    Raises:
        ValueError: the numbers of records and predictions differ.
    """
    if len(records) != len(predictions):
        raise ValueError(f"{len(records)} records but {len(predictions)} predictions")
    rows = []
    for record, prediction in zip(records, predictions, strict=True):
        image = read_image(record["file_name"], format="RGB")
        instances = prediction["instances"] if isinstance(prediction, Mapping) else prediction
        scale = _OVERSAMPLING * _panel_scale(image, height)
        annotations = record.get("annotations", [])
        panels = [
            image,
            _draw_annotations(image, annotations, metadata, scale),
            _draw_predictions(image, instances, metadata, score_threshold, scale),
        ]
        rows.append((Path(record["file_name"]).name, [_fit(p, image, height) for p in panels]))

    cell_width = max((panels[0].shape[1] for _, panels in rows), default=height)
    grid_width = 3 * cell_width + 4 * _MARGIN
    lines = [_captions(["image", "ground truth", "prediction"], cell_width, grid_width)]
    for name, panels in rows:
        lines.append(_captions([name], grid_width, grid_width))
        lines.append(_panel_row(panels, cell_width, grid_width, height))
    return np.concatenate(lines)


def _draw_predictions(
    image: np.ndarray, instances: Instances, metadata: Any, score_threshold: float, scale: float
) -> np.ndarray:
    instances = instances.to("cpu")
    instances = instances[instances.scores >= score_threshold]
    classes = instances.pred_classes.tolist()
    names = _class_names(classes, metadata)
    labels = [f"{n} {s:.0%}" for n, s in zip(names, instances.scores.tolist(), strict=True)]
    masks = boxes = None
    if instances.has("pred_masks"):
        masks = list(torch.as_tensor(instances.pred_masks).numpy())
    else:
        boxes = instances.pred_boxes.tensor.numpy()
    return _overlay(image, classes, labels, masks, boxes, scale)


def _draw_annotations(
    image: np.ndarray, annotations: Sequence[Mapping[str, Any]], metadata: Any, scale: float
) -> np.ndarray:
    classes = [a["category_id"] for a in annotations]
    crowd = ["|crowd" if a.get("iscrowd", 0) else "" for a in annotations]
    labels = [n + c for n, c in zip(_class_names(classes, metadata), crowd, strict=True)]
    masks = boxes = None
    if all(a.get("segmentation") for a in annotations):
        masks = [a["segmentation"] for a in annotations]
    else:
        boxes = np.array(
            [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in annotations]
        )
    return _overlay(image, classes, labels, masks, boxes, scale)


def _overlay(
    image: np.ndarray,
    classes: Sequence[int],
    labels: list[str],
    masks: list[Any] | None,
    boxes: np.ndarray | None,
    scale: float,
) -> np.ndarray:
    """Draw on the image, then scale it: (H, W, 3) to about (H * scale, W * scale, 3)."""
    # Matplotlib cannot make a picture of less than one pixel.
    scale = max(scale, 1.0 / min(image.shape[:2]))
    visualizer = Visualizer(image, scale=scale)
    if masks is not None:
        masks = [_generic_mask(m, *image.shape[:2]) for m in masks]
    visualizer.overlay_instances(
        masks=masks,
        boxes=boxes,
        labels=labels,
        assigned_colors=[_color(c, i) for i, c in enumerate(classes)],
        alpha=0.45,
    )
    return visualizer.output.get_image()


def _generic_mask(mask: Any, height: int, width: int) -> GenericMask:
    if isinstance(mask, np.ndarray) and width == 2:
        # GenericMask takes an array of two columns for points, so give it a wider canvas.
        mask, width = np.pad(mask, ((0, 0), (0, 1))), 3
    return GenericMask(mask, height, width)


def _class_names(classes: Sequence[int], metadata: Any) -> list[str]:
    names = getattr(metadata, "thing_classes", None) or []
    return [names[c] if c < len(names) else str(c) for c in classes]


def _color(category: int, index: int) -> tuple[float, float, float]:
    """A hue per class, the same in every picture; the instance sets the lightness."""
    hue = (0.12 + category * 0.618034) % 1.0  # golden ratio: any few classes are far apart
    return colorsys.hls_to_rgb(hue, (0.5, 0.65, 0.38)[index % 3], 0.9)


def _panel_scale(image: np.ndarray, height: int) -> float:
    return min(height / image.shape[0], _MAX_ASPECT * height / image.shape[1])


def _fit(panel: np.ndarray, image: np.ndarray, height: int) -> np.ndarray:
    """Scale a panel to the size that its image has in a cell; no side is less than 1 pixel."""
    h, w = image.shape[:2]
    scale = _panel_scale(image, height)
    size = (max(1, round(w * scale)), max(1, round(h * scale)))
    interpolation = cv2.INTER_AREA if panel.shape[0] > size[1] else cv2.INTER_LINEAR
    return cv2.resize(panel, size, interpolation=interpolation)


def _panel_row(
    panels: Sequence[np.ndarray], cell_width: int, grid_width: int, height: int
) -> np.ndarray:
    row = np.full((height + 2 * _MARGIN, grid_width, 3), 255, dtype=np.uint8)
    for i, panel in enumerate(panels):
        left = _MARGIN + i * (cell_width + _MARGIN)
        row[_MARGIN : _MARGIN + panel.shape[0], left : left + panel.shape[1]] = panel
    return row


def _captions(texts: Sequence[str], cell_width: int, grid_width: int) -> np.ndarray:
    line = np.full((_CAPTION, grid_width, 3), 255, dtype=np.uint8)
    for i, text in enumerate(texts):
        left = _MARGIN + i * (cell_width + _MARGIN)
        # OpenCV's font has ASCII only.
        text = text.encode("ascii", "replace").decode()
        cv2.putText(
            line,
            text,
            (left, _CAPTION - 5),
            cv2.FONT_HERSHEY_SIMPLEX,
            0.45,
            (0, 0, 0),
            1,
            cv2.LINE_AA,
        )
    return line
