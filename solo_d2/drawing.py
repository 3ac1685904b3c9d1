"""Drawing instances, alone or beside the ground truth. The package has no other drawing code.

Shape shorthand:
    N: instances
    H, W: height and width of the image
    h, w: height and width of one instance's bounding box
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import pycocotools.mask as mask_util
import torch
from detectron2.structures import BoxMode, Instances
from PIL import Image, ImageColor, ImageDraw

from .data.images import read_image
from .label_layout import font, letters_mask, place_labels

Color = tuple[int, int, int]  # RGB

_FILL = 0.4  # opacity of a mask
# Successive colors differ strongly, and all are visible on dark and on bright images.
_PALETTE = [
    ImageColor.getrgb(f"#{code}")
    for code in (
        "ff5252 00beff ffbe00 8c5aff 00c853 ff46c8 bee100 3269ff ff7d00 14e1b4 be6e46 cda5ff"
    ).split()
]

# The grid: margin around a panel and height of a caption in pixels, largest ratio of a panel
_MARGIN = 4
_CAPTION = 18
_MAX_ASPECT = 2.0


class _Region(NamedTuple):
    """What one instance covers: a mask within its bounding box, or the box alone."""

    left: int
    top: int
    width: int
    height: int
    mask: np.ndarray | None  # (h, w) uint8, 0 or 1

    @property
    def area(self) -> int:
        return self.width * self.height if self.mask is None else cv2.countNonZero(self.mask)


def draw_instances(
    image_rgb: np.ndarray,
    instances: Instances,
    names: Sequence[str] | None = None,
    *,
    color_by: str = "instance",
    labels: bool = True,
    score_threshold: float = 0.0,
) -> np.ndarray:
    """Draw masks (or boxes, where there are no masks), class names and scores over an image.

    A label is omitted if it would cover too much of the objects, or another label.

    Args:
        image_rgb: (H, W, 3) uint8; not modified.
        instances: predictions with ``scores``, ``pred_classes`` and ``pred_masks`` (N, H, W),
            ``pred_boxes`` (which contain the masks), or both, on any device.
        names: class names; a class without a name is labeled with its number.
        color_by: "instance" gives each instance a color of its own, "class" each class.
        labels: write class names and scores.
        score_threshold: instances with a lower score are left out.

    Returns:
        (H, W, 3) uint8, RGB.

    Raises:
        ValueError: ``color_by`` has an unsupported value.
    """
    if color_by not in ("instance", "class"):
        raise ValueError(f"color_by is {color_by!r}, not 'instance' or 'class'")
    classes = instances.pred_classes.tolist()
    scores = instances.scores.tolist()
    # Indices among all instances, so that colors do not depend on the threshold.
    kept = [i for i, score in enumerate(scores) if score >= score_threshold]
    colors = [instance_color(i if color_by == "instance" else classes[i]) for i in kept]
    texts = [f"{_name(classes[i], names)} {scores[i]:.0%}" for i in kept]
    return _draw(image_rgb, _predicted_regions(instances, kept), colors, texts if labels else None)


def draw_masks(
    image_rgb: np.ndarray,
    rles: Sequence[Mapping[str, Any]],
    colors: Sequence[Color],
    labels: Sequence[str],
) -> np.ndarray:
    """Draw masks in given colors, with labels where there is room for them.

    Args:
        image_rgb: (H, W, 3) uint8; not modified.
        rles: compressed RLE of each mask, in COCO's format.
        colors: RGB of each mask; see ``instance_color``.
        labels: text of each mask.

    Returns:
        (H, W, 3) uint8, RGB.
    """
    regions = [_mask_region(np.ascontiguousarray(mask_util.decode(rle))) for rle in rles]
    return _draw(image_rgb, regions, colors, labels)


def draw_points(image_rgb: np.ndarray, points: Sequence[tuple[float, float]]) -> np.ndarray:
    """Draw dots over an image.

    Args:
        image_rgb: (H, W, 3) uint8; not modified.
        points: x and y in pixels; integers are pixel centers.

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
    names: Sequence[str] | None,
    *,
    score_threshold: float,
    height: int = 240,
) -> np.ndarray:
    """One row per image: the image, its ground truth and the prediction, below the file name.

    Args:
        records: Detectron2 dataset dicts; "annotations" may be absent or empty.
        predictions: for each record the ``Instances`` at the image's size, or the model's output
            ``{"instances": Instances}``.
        names: class names; a class without a name is labeled with its number.
        score_threshold: predictions with a lower score are left out.
        height: height of a panel in pixels. Images are scaled to it and keep their aspect ratio.

    Returns:
        (rows * (height + margins and caption), W, 3) uint8, RGB; without records only the header.

    Raises:
        ValueError: the numbers of records and predictions differ.
    """
    if len(records) != len(predictions):
        raise ValueError(f"{len(records)} records but {len(predictions)} predictions")
    rows = []
    for record, prediction in zip(records, predictions):
        image = read_image(record["file_name"])
        instances = prediction["instances"] if isinstance(prediction, Mapping) else prediction
        instances = instances[instances.scores >= score_threshold]
        panels = _panels(image, record.get("annotations", []), instances, names, height)
        rows.append((Path(record["file_name"]).name, panels))

    cell_width = max((panels[0].shape[1] for _, panels in rows), default=height)
    lefts = [_MARGIN + i * (cell_width + _MARGIN) for i in range(4)]
    row_height = _CAPTION + height + 2 * _MARGIN
    canvas = Image.new("RGB", (lefts[-1], _CAPTION + len(rows) * row_height), "white")
    draw = ImageDraw.Draw(canvas)
    draw.font = font(12)
    for left, title in zip(lefts, ("image", "ground truth", "prediction")):
        draw.text((left, 1), title, fill="black")
    for i, (name, panels) in enumerate(rows):
        top = _CAPTION + i * row_height
        draw.text((_MARGIN, top + 1), name, fill="black")
        for left, panel in zip(lefts, panels):
            canvas.paste(Image.fromarray(panel), (left, top + _CAPTION + _MARGIN))
    return np.array(canvas)


def _panels(
    image: np.ndarray,
    annotations: Sequence[Mapping[str, Any]],
    instances: Instances,
    names: Sequence[str] | None,
    height: int,
) -> list[np.ndarray]:
    """Image, ground truth, prediction; scaled before anything is drawn, so that lines are sharp."""
    h, w = image.shape[:2]
    scale = min(height / h, _MAX_ASPECT * height / w)
    size = (max(1, round(w * scale)), max(1, round(h * scale)))
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    crowd = [" (crowd)" if a.get("iscrowd", 0) else "" for a in annotations]
    truth = [_name(a["category_id"], names) + suffix for a, suffix in zip(annotations, crowd)]
    predicted = instances.pred_classes.tolist()
    texts = [f"{_name(c, names)} {s:.0%}" for c, s in zip(predicted, instances.scores.tolist())]
    annotated = [_annotated_region(a, h, w) for a in annotations]
    panels = [small]
    for regions, labels in (annotated, truth), (_predicted_regions(instances), texts):
        scaled = [_scale(region, (w, h), size) for region in regions]
        panels.append(_draw(small, scaled, [instance_color(i) for i in range(len(scaled))], labels))
    return panels


def _predicted_regions(instances: Instances, kept: Sequence[int] | None = None) -> list[_Region]:
    """The regions of the instances with the given indices, by default of all."""
    kept = range(len(instances)) if kept is None else kept
    boxes = instances.pred_boxes.tensor.cpu().numpy() if instances.has("pred_boxes") else None
    if boxes is not None and not instances.has("pred_masks"):
        return [_box_region(boxes[i]) for i in kept]
    masks = torch.as_tensor(instances.pred_masks).cpu().numpy()
    masks = masks.astype(bool, copy=False).view(np.uint8)
    if boxes is None:
        return [_mask_region(masks[i]) for i in kept]
    # All masks together can be large, so read each within its box only.
    windows = np.stack([np.floor(boxes[:, :2]) - 1, np.ceil(boxes[:, 2:]) + 1], axis=1)
    windows = windows.clip(0, masks.shape[:0:-1]).astype(int).tolist()
    return [_mask_region(masks[i], *windows[i]) for i in kept]


def _annotated_region(annotation: Mapping[str, Any], height: int, width: int) -> _Region:
    segmentation = annotation.get("segmentation")
    if not segmentation:
        box = BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS)
        return _box_region(np.asarray(box))
    if isinstance(segmentation, list):
        segmentation = mask_util.merge(mask_util.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation["counts"], list):
        segmentation = mask_util.frPyObjects(segmentation, *segmentation["size"])
    return _mask_region(np.ascontiguousarray(mask_util.decode(segmentation)))


def _mask_region(
    mask: np.ndarray, start: Sequence[int] = (0, 0), stop: Sequence[int] | None = None
) -> _Region:
    """``mask``: (H, W) uint8, 0 or 1; only the window from x, y ``start`` to ``stop`` is read."""
    stop = stop or mask.shape[::-1]
    window = np.ascontiguousarray(mask[start[1] : stop[1], start[0] : stop[0]])
    left, top, width, height = cv2.boundingRect(window) if window.size else (0, 0, 0, 0)
    part = np.ascontiguousarray(window[top : top + height, left : left + width])
    return _Region(start[0] + left, start[1] + top, width, height, part)


def _box_region(box: np.ndarray) -> _Region:
    x1, y1, x2, y2 = (round(float(x)) for x in box)
    return _Region(x1, y1, x2 - x1, y2 - y1, None)


def _scale(region: _Region, old: tuple[int, int], new: tuple[int, int]) -> _Region:
    """The region in an image of another width and height; at least a pixel, if it had one."""
    if region.mask is not None and not region.mask.size:
        return region
    x, y = new[0] / old[0], new[1] / old[1]
    left = min(round(region.left * x), new[0] - 1)
    top = min(round(region.top * y), new[1] - 1)
    width = max(1, round((region.left + region.width) * x) - left)
    height = max(1, round((region.top + region.height) * y) - top)
    mask = region.mask
    if mask is not None:
        mask = cv2.resize(mask * 255, (width, height), interpolation=cv2.INTER_LINEAR)
        mask = (mask > 127).astype(np.uint8)
    return _Region(left, top, width, height, mask)


def _draw(
    image: np.ndarray,
    regions: Sequence[_Region],
    colors: Sequence[Color],
    texts: Sequence[str] | None,
) -> np.ndarray:
    """Fill all regions, large ones first, then outline them, then label them."""
    image = np.ascontiguousarray(image).copy()
    size = float(np.sqrt(image.shape[0] * image.shape[1]))
    thickness = max(1, round(size / 500))
    order = [i for i in np.argsort([-r.area for r in regions]) if min(regions[i][2:4]) > 0]
    for i in order:
        _fill(image, regions[i], colors[i])
    for i in order:
        _outline(image, regions[i], colors[i], thickness)
    if texts is not None:
        font_size = int(np.clip(size / 45, 10, 40))
        labels = [letters_mask(texts[i], font_size) for i in order]
        boxes = [regions[i][:4] for i in order]
        places = place_labels(_owners([regions[i] for i in order], image), boxes, labels)
        for i, letters, place in zip(order, labels, places):
            if place is not None:
                _write(image, letters, place, colors[i])
    return image


def _fill(image: np.ndarray, region: _Region, color: Color) -> None:
    if region.mask is None:
        return
    part = _part(image, region)
    mask = region.mask[: part.shape[0], : part.shape[1]]
    levels = np.arange(256)[:, None] * (1 - _FILL) + np.array(color) * _FILL
    blended = cv2.LUT(np.ascontiguousarray(part), levels.round().astype(np.uint8)[None])
    np.copyto(part, blended, where=mask[..., None].astype(bool))


def _outline(image: np.ndarray, region: _Region, color: Color, thickness: int) -> None:
    left, top, width, height, mask = region
    if mask is None:
        cv2.rectangle(image, (left, top, width, height), color, thickness, cv2.LINE_AA)
        return
    contours, _ = cv2.findContours(
        mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE, offset=(left, top)
    )
    cv2.drawContours(image, contours, -1, color, thickness, cv2.LINE_AA)


def _owners(regions: Sequence[_Region], image: np.ndarray) -> np.ndarray:
    """(H, W): at each pixel the number, from 1, of the region drawn there last; 0 for none."""
    owner = np.zeros(image.shape[:2], np.int32)
    for number, region in enumerate(regions, 1):
        if region.mask is not None:
            part = _part(owner, region)
            part[region.mask[: part.shape[0], : part.shape[1]].astype(bool)] = number
    return owner


def _part(array: np.ndarray, region: _Region) -> np.ndarray:
    """The view of (H, W, ...) that the region's bounding box covers."""
    left, top, width, height, _ = region
    return array[top : top + height, left : left + width]


def _write(image: np.ndarray, letters: np.ndarray, place: tuple[int, int], color: Color) -> None:
    """The letters on a plate of the given color, black or white, whichever is easier to read."""
    x, y = place
    part = image[y : y + letters.shape[0], x : x + letters.shape[1]]
    ink = 0.0 if np.dot(color, (0.299, 0.587, 0.114)) > 120 else 255.0
    opacity = letters[..., None].astype(np.float32) / 255
    part[:] = (np.array(color) * (1 - opacity) + ink * opacity).round()


def _name(category: int, names: Sequence[str] | None) -> str:
    return names[category] if names and category < len(names) else str(category)


def instance_color(number: int) -> Color:
    """RGB of the color with this number. After its last color the palette repeats, lighter, then
    darker.
    """
    target, weight = ((0, 0.0), (255, 0.35), (0, 0.3))[number // len(_PALETTE) % 3]
    base = np.array(_PALETTE[number % len(_PALETTE)])
    red, green, blue = (base + (target - base) * weight).round().astype(int).tolist()
    return red, green, blue
