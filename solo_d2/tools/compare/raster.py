"""Pictures of the SVG that ``plots`` and ``gallery`` make, for report.md."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, PathPatch, Rectangle
from matplotlib.path import Path as Outline
from matplotlib.patheffects import withStroke

from solo_d2.files import atomic_write
from solo_d2.tools.compare.markup import Markup
from solo_d2.tools.compare.plots import COLORS

_DPI = 100  # a unit of the SVG is 1/100 inch
_POINTS = 72 / _DPI  # matplotlib has widths and fonts in points


def write_picture(
    svg: Markup, path: Path, images: Mapping[str, np.ndarray] | None = None, scale: float = 2
) -> None:
    """Draw an SVG in the light colors; ``.png`` or ``.jpg``, ``scale`` pixels per unit.

    Understood: svg (nested too), g, line, polyline, path (M, L, Z), rect, circle, text, and use of
    ``images`` (name -> (H, W, 3) uint8). Elements that are hidden are left out.
    """
    root = ElementTree.fromstring(svg)
    width, height = _view(root)
    figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI * scale)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    _Drawing(axes, images or {}).draw(root, np.zeros(2), 1.0)
    axes.set(xlim=(0, width), ylim=(height, 0), aspect="auto")
    kind = {".jpg": "jpeg"}.get(path.suffix, path.suffix[1:])
    with atomic_write(path) as file, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # e.g. Chinese class names
        extra: dict[str, Any] = {"pil_kwargs": {"quality": 85}} if kind == "jpeg" else {}
        figure.savefig(file, format=kind, **extra)


def _view(node: Element) -> tuple[float, float]:
    width, height = node.get("viewBox", "0 0 1 1").split()[2:]
    return float(width), float(height)


def _numbers(node: Element, *names: str) -> np.ndarray:
    return np.array([float(node.get(name, 0)) for name in names])


def _color(value: str | None) -> str:
    """What matplotlib knows the color as; var(--x) is the light value."""
    variable = re.fullmatch(r"var\(--(\w+)\)", value or "none")
    return COLORS[variable[1]][0] if variable else value or "none"


class _Drawing:
    """Puts one node after the other on the axes, whose unit is that of the outermost svg."""

    def __init__(self, axes: Axes, images: Mapping[str, np.ndarray]) -> None:
        self.axes, self.images, self.order = axes, images, 0

    def draw(self, node: Element, origin: np.ndarray, unit: float) -> None:
        """Draw a node and what is in it, unless it is hidden; its frame is given."""
        if node.get("hidden") is not None:
            return
        tag = node.tag.rpartition("}")[2]
        if tag == "svg":
            origin = origin + unit * _numbers(node, "x", "y")
            width, _ = _view(node)
            unit *= float(node.get("width", width)) / width
        if tag in ("svg", "g"):
            for child in node:
                self.draw(child, origin, unit)
            return
        self.order += 1
        getattr(self, f"_{tag}")(node, origin, unit)

    def _style(self, node: Element, unit: float) -> dict[str, Any]:
        width = unit * float(node.get("stroke-width", 1)) if node.get("stroke") else 0.0
        return {
            "alpha": float(node.get("opacity", 1)),
            "linewidth": width * _POINTS,
            "linestyle": (0, (4, 2)) if node.get("stroke-dasharray") else "-",
            "zorder": self.order,
        }

    def _line(self, node: Element, origin: np.ndarray, unit: float) -> None:
        ends = np.stack([_numbers(node, "x1", "y1"), _numbers(node, "x2", "y2")])
        self._stroke(node, origin + unit * ends, unit)

    def _polyline(self, node: Element, origin: np.ndarray, unit: float) -> None:
        points = [[float(v) for v in p.split(",")] for p in node.get("points", "").split()]
        self._stroke(node, origin + unit * np.array(points).reshape(-1, 2), unit)

    def _stroke(self, node: Element, points: np.ndarray, unit: float) -> None:
        style: dict[str, Any] = {"color": _color(node.get("stroke")), "solid_capstyle": "butt"}
        self.axes.plot(points[:, 0], points[:, 1], **style, **self._style(node, unit))

    def _path(self, node: Element, origin: np.ndarray, unit: float) -> None:
        steps = re.findall(r"([MLZ])(?:([-\d.]+),([-\d.]+))?", node.get("d", ""))
        codes = {"M": Outline.MOVETO, "L": Outline.LINETO, "Z": Outline.CLOSEPOLY}
        points = np.array([[float(x or 0), float(y or 0)] for _, x, y in steps]).reshape(-1, 2)
        outline = Outline(origin + unit * points, [codes[letter] for letter, _, _ in steps])
        # Twice, as the opacity of the fill is not that of the stroke.
        style = self._style(node, unit)
        edge = PathPatch(outline, facecolor="none", edgecolor=_color(node.get("stroke")), **style)
        style |= {"alpha": float(node.get("fill-opacity", 1)), "linewidth": 0}
        self.axes.add_patch(PathPatch(outline, facecolor=_color(node.get("fill")), **style))
        self.axes.add_patch(edge)

    def _rect(self, node: Element, origin: np.ndarray, unit: float) -> None:
        corner = origin + unit * _numbers(node, "x", "y")
        width, height = unit * _numbers(node, "width", "height")
        style = {"facecolor": _color(node.get("fill")), **self._style(node, unit)}
        self.axes.add_patch(Rectangle((corner[0], corner[1]), width, height, **style))

    def _circle(self, node: Element, origin: np.ndarray, unit: float) -> None:
        x, y = origin + unit * _numbers(node, "cx", "cy")
        style = {"facecolor": _color(node.get("fill")), "edgecolor": _color(node.get("stroke"))}
        radius = unit * float(node.get("r", 0))
        self.axes.add_patch(Circle((x, y), radius, **style, **self._style(node, unit)))

    def _text(self, node: Element, origin: np.ndarray, unit: float) -> None:
        x, y = origin + unit * _numbers(node, "x", "y")
        anchor = {"middle": "center", "end": "right"}.get(node.get("text-anchor", ""), "left")
        size = unit * float(node.get("font-size", 12)) * _POINTS
        place: dict[str, Any] = {
            "ha": anchor,
            "va": "baseline",
            "fontsize": size,
            "zorder": self.order,
        }
        color = _color(node.get("fill"))
        drawn = self.axes.text(x, y, node.text or "", color=color, parse_math=False, **place)
        if node.get("stroke"):
            width, edge = self._style(node, unit)["linewidth"], _color(node.get("stroke"))
            drawn.set_path_effects([withStroke(linewidth=width, foreground=edge)])

    def _use(self, node: Element, origin: np.ndarray, unit: float) -> None:
        left, top = origin + unit * _numbers(node, "x", "y")
        width, height = unit * _numbers(node, "width", "height")
        image = self.images[node.get("href", "#")[1:]]
        extent = (left, left + width, top + height, top)
        self.axes.imshow(image, extent=extent, zorder=self.order)
