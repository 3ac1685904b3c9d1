"""The same images segmented by every model, beside the ground truth, as SVG over the image."""

from __future__ import annotations

import base64
import colorsys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pycocotools.mask as mask_util
from detectron2.data.detection_utils import read_image

from solo_d2.tools.compare.markup import Markup, element
from solo_d2.tools.compare.plots import Box, free_place, shorten, svg, text, text_width
from solo_d2.tools.compare.summary import Report, finite

SIDE = 320  # units of the longer side of a panel
_IMAGE_SIDE = 640  # pixels of the longer side of the embedded image, at most
_FONT = 12
MOST_OBJECTS = 40  # drawn per panel; more hide each other
MATCH_IOU = 0.5
_UNMATCHED, _CROWD = "#ff3b8d", "#9aa4ae"


@dataclass(frozen=True)
class Panel:
    """``model`` is the index in the report, None for the ground truth."""

    model: int | None
    name: str
    picture: Markup
    note: str


class Entry:
    """One image of the gallery: ``entry`` of the report's "gallery", ``index`` in it."""

    def __init__(self, report: Report, entry: Mapping[str, Any], index: int) -> None:
        self.entry = entry
        self.key = f"image{index}"
        self.file_name = Path(entry["file_name"]).name
        self._report = report
        self._scale = SIDE / max(entry["height"], entry["width"], 1)
        self.width = max(1.0, round(entry["width"] * self._scale, 1))
        self.height = max(1.0, round(entry["height"] * self._scale, 1))

    @cached_property
    def image(self) -> np.ndarray:
        """(H, W, 3) uint8 RGB, small; gray when the file cannot be read any more."""
        try:
            image = np.ascontiguousarray(read_image(self.entry["file_name"], format="RGB"))
        except (OSError, ValueError):
            return np.full((max(1, int(self.height)), max(1, int(self.width)), 3), 128, np.uint8)
        scale = _IMAGE_SIDE / max(image.shape[:2])
        if scale < 1:
            height, width = image.shape[:2]
            size = (max(1, round(width * scale)), max(1, round(height * scale)))
            image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        return image

    def definition(self) -> Markup:
        """The image itself, which every panel uses by its key."""
        _, data = cv2.imencode(".jpg", self.image[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, 85])
        source = "data:image/jpeg;base64," + base64.b64encode(data.tobytes()).decode()
        size = {"width": self.width, "height": self.height, "preserveAspectRatio": "none"}
        return element("image", id=self.key, href=source, **size)

    @cached_property
    def panels(self) -> list[Panel]:
        """The ground truth, then every model that has predictions of this image."""
        truth = self.entry.get("ground_truth") or []
        colors = [_CROWD if t.get("crowd") else instance_color(i) for i, t in enumerate(truth)]
        objects = [{**t, "color": c, "dashed": bool(t.get("crowd"))} for t, c in zip(truth, colors)]
        panels = [Panel(None, "ground truth", self._draw(objects), _count(truth))]
        for index, model in enumerate(self._report["models"]):
            predictions = (self.entry.get("predictions") or {}).get(model["name"])
            if predictions is None:
                continue
            predictions = sorted(predictions, key=lambda p: -p["score"])[:MOST_OBJECTS]
            matches = match(_overlaps(predictions, truth), [bool(t.get("crowd")) for t in truth])
            objects = [
                {**p, "color": _UNMATCHED if m is None else colors[m], "dashed": m is None}
                for p, m in zip(predictions, matches)
            ]
            iou = (self.entry.get("ious") or {}).get(model["name"])
            note = f"mean IoU {iou:.2f}" if finite(iou) else ""
            panels.append(Panel(index, model["name"], self._draw(objects), note))
        return panels

    def sheet(self, columns: int = 4) -> Markup:
        """All panels in one picture, with captions."""
        gap, caption = 10, 24
        columns = min(columns, len(self.panels))
        rows = -(-len(self.panels) // columns)
        cell = (self.width + gap, self.height + caption)
        children = []
        for i, panel in enumerate(self.panels):
            x, y = (i % columns) * cell[0], (i // columns) * cell[1]
            name = shorten(f"{panel.name}  {panel.note}", max(4, int(self.width / 8)))
            children.append(text(x, y + 16, name, fill="var(--ink)", font_size=13))
            at = f'<svg x="{x:.1f}" y="{y + caption - 2:.1f}" width="{self.width}" '
            children.append(Markup(panel.picture.replace("<svg ", at, 1)))
        return svg(columns * cell[0] - gap, rows * cell[1], *children)

    def _draw(self, objects: Sequence[Mapping[str, Any]]) -> Markup:
        """Objects in the order of their scores, best first: it is on top and has a label."""
        threshold = score_threshold(self._report)
        bounds = (0.0, 0.0, self.width, self.height)
        shapes: list[Markup] = []
        labels: list[Markup] = []
        taken: list[Box] = []
        for item in objects:
            score = item.get("score")
            name = item["class"] + (" (crowd)" if item.get("crowd") else "")
            name += "" if score is None else f" {score:.2f}"
            hidden = score is not None and score < threshold
            path, box = outline(item["rle"], self._scale)
            style: dict[str, Any] = {"stroke": item["color"], "stroke_width": 2}
            style |= {"stroke_dasharray": "5 3" if item["dashed"] else None}
            shape = element("path", d=path, fill=item["color"], fill_opacity=0.35, **style)
            tip = name + ("\nmatches no object" if score is not None and item["dashed"] else "")
            more = {"class_": "object", "data_score": score, "data_tip": tip}
            shapes.append(element("g", shape, hidden=hidden, **more))
            label = shorten(name, 24)
            place = free_place(_label_places(label, box), taken, bounds)
            if place:
                taken.append(place)
                style = {"fill": "#fff", "stroke": "#000", "stroke_width": 2.5}
                style |= {"paint_order": "stroke", "font_size": _FONT, "font_weight": 600}
                style |= {"data_score": score, "hidden": hidden}
                labels.append(text(place[0] + 1, place[3] - 3, label, **style))
        size = {"width": self.width, "height": self.height}
        image = element("use", href=f"#{self.key}", **size)
        return svg(self.width, self.height, image, *reversed(shapes), *labels)


def score_threshold(report: Report) -> float:
    value = (report.get("settings") or {}).get("score_threshold")
    return 0.3 if value is None else float(value)


def instance_color(index: int) -> str:
    """Any few neighbors are far apart in hue; never the pink of what matches nothing."""
    hue = (0.33 + index * 0.618034) % 1.0 * 0.86  # 0.86 and above are pinks
    red, green, blue = colorsys.hls_to_rgb(hue, (0.5, 0.62, 0.42)[index % 3], 0.9)
    return f"#{round(red * 255):02x}{round(green * 255):02x}{round(blue * 255):02x}"


def match(overlaps: np.ndarray, crowd: Sequence[bool]) -> list[int | None]:
    """For each prediction, best first, the object it finds: each object is found once.

    Args:
        overlaps: (predictions, objects) IoU; with a crowd the share of the prediction inside.
        crowd: per object; a crowd can be found many times.

    Returns:
        Index of the object with the largest overlap among those left, None below ``MATCH_IOU``.
    """
    found: list[int | None] = []
    left = np.ones(len(crowd), dtype=bool)
    for row in overlaps:
        row = np.where(left, row, 0.0)
        best = int(row.argmax()) if len(row) else -1
        if best < 0 or row[best] < MATCH_IOU:
            found.append(None)
            continue
        left[best] = crowd[best]
        found.append(best)
    return found


def outline(rle: Mapping[str, Any], scale: float) -> tuple[str, Box]:
    """SVG path of a mask, holes wound the other way round, and its box, both times ``scale``."""
    x, y, w, h = (int(v) for v in mask_util.toBbox(rle))
    box = (x * scale, y * scale, (x + w) * scale, (y + h) * scale)
    if not w or not h:
        return "", box
    mask = np.pad(mask_util.decode(rle)[y : y + h, x : x + w], 1)
    # At the size of the panel: a contour runs through centers of pixels, half a pixel inside.
    size = (max(3, round((w + 2) * scale)), max(3, round((h + 2) * scale)))
    way = cv2.INTER_AREA if scale < 1 else cv2.INTER_NEAREST
    mask = (cv2.resize(mask.astype(np.float32), size, interpolation=way) >= 0.5).astype(np.uint8)
    contours, _ = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    parts = []
    for contour in contours:
        points = cv2.approxPolyDP(contour, 0.6, True)[:, 0]
        if len(points) > 2:
            points = points + 0.5 + ((x - 1) * scale, (y - 1) * scale)
            parts.append("M" + "L".join(f"{px:.1f},{py:.1f}" for px, py in points) + "Z")
    if not parts:  # too small to have a contour
        x1, y1, x2, y2 = (f"{v:.1f}" for v in box)
        parts = [f"M{x1},{y1}L{x2},{y1}L{x2},{y2}L{x1},{y2}Z"]
    return "".join(parts), box


def _overlaps(predictions: Sequence[Mapping], truth: Sequence[Mapping]) -> np.ndarray:
    if not predictions or not truth:
        return np.zeros((len(predictions), len(truth)))
    crowd = [int(bool(t.get("crowd"))) for t in truth]
    found = mask_util.iou([p["rle"] for p in predictions], [t["rle"] for t in truth], crowd)
    return np.asarray(found)


def _count(truth: Sequence[object]) -> str:
    return f"{len(truth)} object" + "s" * (len(truth) != 1)


def _label_places(label: str, box: Box) -> list[Box]:
    """Above the object, inside its top, below it; each from its left, its middle and its right."""
    w, h = text_width(label, _FONT), _FONT * 1.2
    x1, y1, x2, y2 = box
    middle = ((x1 + x2 - w) / 2, (y1 + y2 - h) / 2)
    tops = (y1 - h, y1 + 1, y2, middle[1], y2 - h)
    return [(left, top, left + w, top + h) for top in tops for left in (x1, middle[0], x2 - w)]
