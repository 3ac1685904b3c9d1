"""Pictures of the images on which models differ most."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from solo_d2.data.images import read_image
from solo_d2.drawing import draw_masks, instance_color
from solo_d2.evaluation.oracle import match, overlaps

_PANEL_SIDE = 480  # pixels of a panel's longer side, at most
# In bytes of all pictures: with them, in base64, the page stays below about 10 MB.
_BUDGET = 4_500_000
_UNMATCHED, _CROWD = (255, 59, 141), (154, 164, 174)


def make_gallery(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Pictures of the ground truth and of each model's detections, as many as fit into the page.

    Returns:
        For each image "name", "note" and "panels", each with "name", "note", "image" (a WebP file)
        and "model", its index.
    """
    figures: list[dict[str, Any]] = []
    size = 0
    for entry in report["gallery"]:
        panels = _panels(report, entry)
        size += sum(len(p["image"]) for p in panels)
        if figures and size > _BUDGET:
            break
        span = entry["disagreement"]
        note = "" if span is None else f"disagreement {span:.2f}"
        figures.append({"name": Path(entry["file_name"]).name, "note": note, "panels": panels})
    return figures


def _panels(report: Mapping[str, Any], entry: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The ground truth and each model; the same object has the same color in every panel."""
    truth = entry["ground_truth"]
    try:
        image = read_image(entry["file_name"])
    except (OSError, ValueError):  # gone since
        image = np.full((*(truth[0]["rle"]["size"] if truth else (240, 320)), 3), 128, np.uint8)
    colors = [_CROWD if x["iscrowd"] else instance_color(i) for i, x in enumerate(truth)]
    labels = [x["class"] + " (crowd)" * x["iscrowd"] for x in truth]
    note = f"{len(truth)} object{'s' * (len(truth) != 1)}"
    shown: list[tuple] = [("ground truth", None, note, truth, colors, labels)]
    for index, name in enumerate(m["name"] for m in report["models"]):
        if (found := entry["predictions"].get(name)) is None:
            continue
        matches = match(overlaps([x["rle"] for x in found], truth), [x["iscrowd"] for x in truth])
        colors_found = [_UNMATCHED if m is None else colors[m] for m in matches]
        labels = [f"{x['class']} {x['score']:.0%}" for x in found]
        mean = entry["ious"].get(name)
        note = "" if mean is None else f"mean IoU {mean:.2f}"
        shown.append((name, index, note, found, colors_found, labels))
    return [
        {"name": name, "model": index, "note": note, "image": _picture(image, *drawn)}
        for name, index, note, *drawn in shown
    ]


def _picture(
    image: np.ndarray,
    objects: Sequence[Mapping[str, Any]],
    colors: Sequence[tuple[int, int, int]],
    labels: Sequence[str],
) -> bytes:
    """A WebP file."""
    drawn = draw_masks(image, [x["rle"] for x in objects], colors, labels)
    scale = _PANEL_SIDE / max(drawn.shape[:2])
    if scale < 1:
        side = (max(1, round(drawn.shape[1] * scale)), max(1, round(drawn.shape[0] * scale)))
        drawn = cv2.resize(drawn, side, interpolation=cv2.INTER_AREA)
    _, data = cv2.imencode(".webp", drawn[:, :, ::-1], [cv2.IMWRITE_WEBP_QUALITY, 80])
    return data.tobytes()
