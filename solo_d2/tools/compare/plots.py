"""The report's charts as SVG. Colors are CSS variables (``COLORS``), so the page can be dark.

Elements carry what the page's script looks for: ``data-model`` (index, to show and hide a model),
``data-choice`` (shown when the figure's selects say so) and ``data-tip`` (text at the pointer).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from solo_d2.tools.compare.markup import Markup, element, join
from solo_d2.tools.compare.summary import (
    PARTS,
    TASKS,
    Cell,
    Model,
    Report,
    finite,
    get,
    latency,
    number,
    statistic,
)

# Light and dark value of each. Models' and parts' colors have a contrast above 3 with both.
COLORS = {
    "ink": ("#1c2126", "#e6e9ec"),
    "muted": ("#5b646e", "#a0a9b3"),
    "grid": ("#e2e6ea", "#323a42"),
    "paper": ("#ffffff", "#181c20"),
    "part0": ("#8a63d2", "#8a63d2"),
    "part1": ("#3b7dd8", "#3b7dd8"),
    "part2": ("#d9730d", "#d9730d"),
    "part3": ("#2f9e44", "#2f9e44"),
}
_MODEL_COLORS = "#3b7dd8 #d9580d #2f9e44 #9c5fd6 #d6336c #0c8f9c #a87b00 #76808c #a9623a #5f8f00"
COLORS |= {f"m{i}": (c, c) for i, c in enumerate(_MODEL_COLORS.split())}

_WIDTH, _HEIGHT = 500, 320
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 14, 28, 46
_FONT = 13
_MOST_POINTS = 300  # of a curve; more cannot be seen

Box = tuple[float, float, float, float]  # x1, y1, x2, y2
Point = tuple[float, float]


def color(model: int) -> str:
    return f"var(--m{model % len(_MODEL_COLORS.split())})"


def _dash(model: int) -> str | None:
    """Past the last color they start again, dashed."""
    return "6 3" if model // len(_MODEL_COLORS.split()) % 2 else None


@dataclass(frozen=True)
class Axis:
    """Maps values to 0..1."""

    label: str
    low: float
    high: float
    log: bool = False

    @classmethod
    def around(cls, label: str, values: Sequence[float], log_from: float = math.inf) -> Axis:
        """With a margin; logarithmic when the largest is ``log_from`` times the smallest."""
        low, high = min(values, default=0.0), max(values, default=1.0)
        if 0 < low * log_from <= high:
            margin = (high / low) ** 0.08
            return cls(label, low / margin, high * margin, log=True)
        margin = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
        return cls(label, low - margin if low < 0 else max(0.0, low - margin), high + margin)

    def at(self, value: float) -> float:
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        if self.log:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for steps in ((1, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
                ticks = [s * 10.0**p for p in powers for s in steps]
                ticks = [t for t in ticks if self.low <= t <= self.high]
                if len(ticks) <= 8:
                    break
            return ticks
        rough = (self.high - self.low) / 5
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(s * power for s in (1, 2, 2.5, 5, 10) if s * power >= rough * 0.999)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [i * step for i in range(first, last + 1)]


@dataclass(frozen=True)
class Series:
    """A model's curve."""

    model: int
    points: Sequence[Point]
    tip: str
    choice: str | None = None


@dataclass(frozen=True)
class Dot:
    """A model in the plane, with the ranges of its two values."""

    model: int
    name: str
    x: float
    y: float
    x_range: Point | None
    y_range: Point | None
    tip: str


def text_width(text: str, size: float = _FONT) -> float:
    """An upper bound for most fonts."""
    return sum(1.0 if ord(c) > 0x2E80 else 0.62 for c in text) * size


def shorten(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def free_place(candidates: Iterable[Box], taken: Sequence[Box], bounds: Box) -> Box | None:
    """The first candidate inside ``bounds`` that overlaps nothing, None if there is none."""
    for box in candidates:
        inside = box[0] >= bounds[0] and box[1] >= bounds[1]
        inside = inside and box[2] <= bounds[2] and box[3] <= bounds[3]
        if inside and not any(overlap(box, other) for other in taken):
            return box
    return None


def label_boxes(
    points: Sequence[Point], labels: Sequence[str], bounds: Box, obstacles: Sequence[Box] = ()
) -> list[Box | None]:
    """Where to write each point's label: beside it, on no other point, label or obstacle.

    None where there is no room.
    """
    dots: list[Box] = [(x - 6, y - 6, x + 6, y + 6) for x, y in points]
    boxes: list[Box | None] = []
    for i, ((x, y), label) in enumerate(zip(points, labels)):
        w, h = text_width(label), _FONT * 1.25
        others = [*dots[:i], *dots[i + 1 :], *obstacles, *(box for box in boxes if box)]
        boxes.append(free_place(_around(x, y, w, h), others, bounds))
    return boxes


def _around(x: float, y: float, w: float, h: float) -> Iterable[Box]:
    """Boxes of size (w, h) round a point: right, left, above, below, then farther out."""
    for distance in (9, 22, 38, 56, 76):
        for dx, dy in ((1, 0), (-1, 0), (0, -1), (0, 1), (1, -1), (1, 1), (-1, -1), (-1, 1)):
            # (left, top) such that the near side is at `distance`; centered along the other side.
            left = x - w / 2 + dx * (w / 2 + (distance if not dy else distance / 2))
            top = y - h / 2 + dy * (h / 2 + (distance if not dx else distance / 2))
            yield (left, top, left + w, top + h)


def text(x: float, y: float, value: str, anchor: str = "start", **attributes: object) -> Markup:
    attributes = {"fill": "var(--muted)", "font_size": _FONT, **attributes}
    return element("text", value, x=_round(x), y=_round(y), text_anchor=anchor, **attributes)


def svg(width: float, height: float, *children: object, **attributes: object) -> Markup:
    return element(
        "svg",
        *children,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {_round(width)} {_round(height)}",
        **{"role": "img", **attributes},
    )


def curves(
    title: str, x: Axis, y: Axis, series: Sequence[Series], choice: str | None = None, **extra: str
) -> Markup:
    """Lines; with few points these are marked, but not those of curves to choose from (PR)."""
    lines = []
    for s in series:
        points = [_place(x, y, p) for p in _thin(s.points)]
        dots = [
            element("circle", cx=_round(px), cy=_round(py), r=3.5, fill=color(s.model))
            for px, py in (points if len(points) <= 12 and s.choice is None else [])
        ]
        line = element(
            "polyline",
            points=" ".join(f"{_round(px)},{_round(py)}" for px, py in points),
            fill="none",
            stroke=color(s.model),
            stroke_width=1.8,
            stroke_dasharray=_dash(s.model),
            stroke_linejoin="round",
        )
        lines.append(
            element(
                "g",
                line,
                *dots,
                class_="curve",
                data_model=s.model,
                data_choice=s.choice,
                data_tip=s.tip,
            )
        )
    frame = _frame(x, y)
    return svg(_WIDTH, _HEIGHT, frame, *lines, aria_label=title, data_choice=choice, **extra)


def scatter(title: str, x: Axis, y: Axis, dots: Sequence[Dot]) -> Markup:
    """Named points with error bars."""
    places = [_place(x, y, (d.x, d.y)) for d in dots]
    names = [shorten(d.name, 26) for d in dots]
    bounds = (_LEFT + 2, _TOP, _WIDTH - 2, _HEIGHT - _BOTTOM)
    bars: list[list[tuple[Point, Point]]] = []
    for d in dots:
        across = [[(v, d.y) for v in d.x_range]] if d.x_range else []
        across += [[(d.x, v) for v in d.y_range]] if d.y_range else []
        bars.append([(_place(x, y, a), _place(x, y, b)) for a, b in across])
    obstacles = [
        (min(a[0], b[0]) - 2, min(a[1], b[1]) - 2, max(a[0], b[0]) + 2, max(a[1], b[1]) + 2)
        for both in bars
        for a, b in both
    ]
    boxes = label_boxes(places, names, bounds, obstacles)
    groups = []
    for d, (px, py), name, box, both in zip(dots, places, names, boxes, bars):
        stroke: dict[str, Any] = {"stroke": color(d.model), "stroke_width": 1.5, "opacity": 0.55}
        parts: list[Markup] = []
        if box and not (box[0] - 10 <= px <= box[2] + 10 and box[1] - 10 <= py <= box[3] + 10):
            end = (min(max(px, box[0]), box[2]), min(max(py, box[1]), box[3]))
            parts.append(_line((px, py), end, stroke="var(--muted)", stroke_width=0.8))
        parts += [_line(*ends, **stroke) for ends in both]
        parts.append(
            element(
                "circle",
                cx=_round(px),
                cy=_round(py),
                r=6,
                fill=color(d.model),
                stroke="var(--paper)",
                stroke_width=1.5,
            )
        )
        if box:
            parts.append(text(box[0], box[3] - 4, name, fill="var(--ink)"))
        tip = {"data_tip": d.tip, "aria_label": d.tip, "role": "img", "tabindex": 0}
        groups.append(element("g", *parts, data_model=d.model, **tip))
    names_of_plot = {"role": "group", "aria_label": title, "data_choice": title}
    return svg(_WIDTH, _HEIGHT, _frame(x, y), *groups, **names_of_plot)


def legend(names: Sequence[tuple[str, str]], left: float = _LEFT) -> Markup:
    """(color, name) one after the other, in as many lines as they need."""
    items, x, y = [], left, 12.0
    for fill, name in names:
        name = shorten(name, 34)
        width = 18 + text_width(name)
        if x + width > _WIDTH and x > left:
            x, y = left, y + 20
        items += [
            element("rect", x=_round(x), y=y - 10, width=12, height=12, fill=fill),
            text(x + 17, y, name, fill="var(--ink)"),
        ]
        x += width + 12
    return svg(_WIDTH, y + 12, *items)


def model_legend(report: Report) -> Markup:
    return legend([(color(i), m["name"]) for i, m in enumerate(report["models"])])


def below(*pictures: Markup, **attributes: object) -> Markup:
    """Pictures (from ``svg``) one below the other."""
    y, placed, widths = 0.0, [], []
    for picture in pictures:
        # viewBox="0 0 WIDTH HEIGHT" is the first attribute after xmlns.
        width, height = (float(v) for v in picture.split('viewBox="0 0 ')[1].split('"')[0].split())
        inner = picture.replace("<svg ", f'<svg x="0" y="{y:g}" width="{width:g}" ', 1)
        placed.append(Markup(inner.replace("<svg ", f'<svg height="{height:g}" ', 1)))
        widths.append(width)
        y += height
    return svg(max(widths), y, *placed, **attributes)


def accuracy_plots(report: Report) -> list[tuple[str, Markup]]:
    """(choice, plot) of mask (or box) AP against latency at each batch size, FLOPs and size."""
    models = report["models"]
    batches = sorted({t["batch"] for m in models for t in m.get("latency") or []})
    kinds = [(f"latency, batch {b}", f"ms per image, batch {b}", b) for b in batches]
    kinds += [("FLOPs", "GFLOPs", "flops"), ("parameters", "parameters, M", "parameters")]
    plots = []
    for task, task_name in TASKS.items():
        for kind, label, key in kinds:
            choice = f"{task_name} AP, {kind}"
            dots = [
                dot
                for i, model in enumerate(models)
                if (dot := _accuracy_dot(i, model, task, key, label)) is not None
            ]
            if dots:
                xs = [v for d in dots for v in (d.x, *(d.x_range or ()))]
                ys = [v for d in dots for v in (d.y, *(d.y_range or ()))]
                x, y = Axis.around(label, xs, log_from=8), Axis.around(f"{task_name} AP", ys)
                plots.append((choice, scatter(choice, x, y, dots)))
    return plots


def _accuracy_dot(i: int, model: Model, task: str, key: int | str, label: str) -> Dot | None:
    ap = statistic(get(model, "metrics", task, "AP"))
    x_range = None
    if isinstance(key, int):
        total = get(latency(model, key), "total") or {}
        x = _scaled(total.get("median"), 1e3)
        low, high = _scaled(total.get("q1"), 1e3), _scaled(total.get("q3"), 1e3)
        x_range = (low, high) if low and high else None
    else:
        x = _scaled(model.get(key), 1e-9 if key == "flops" else 1e-6)
    if x is None or ap.value is None:
        return None
    y_range = (ap.value - ap.spread, ap.value + ap.spread) if ap.spread else None
    tip = f"{model['name']}\n{TASKS[task]} AP {_with_spread(ap)}\n{number(x)} {label}"
    return Dot(i, model["name"], x, ap.value, x_range, y_range, tip)


def loss_plots(report: Report) -> list[tuple[str, Markup]]:
    """(loss, plot over iterations), the total loss first; the stages of a training in turn."""
    found: dict[str, list[Series]] = {"total_loss": []}
    for i, model in enumerate(report["models"]):
        for curve, offset in _training_runs(model):
            for loss, values in (curve.get("losses") or {}).items():
                points = _points(curve.get("iteration") or [], values, offset)
                if points:
                    tip = _run_tip(model, curve) + f"\nlast {number(points[-1][1])}"
                    found.setdefault(loss, []).append(Series(i, points, tip))
    return [(k, _over_iterations(k, k, s, log_from=8)) for k, s in found.items() if s]


def validation_plots(report: Report) -> list[tuple[str, Markup]]:
    """(metric, plot over iterations) of what was evaluated while the models were trained."""
    found: dict[str, list[Series]] = {}
    for i, model in enumerate(report["models"]):
        for curve, offset in _training_runs(model):
            validation = curve.get("validation") or {}
            for task, name in TASKS.items():
                values = validation.get(f"{task}/AP") or []
                points = _points(validation.get("iteration") or [], values, offset)
                if points:
                    tip = _run_tip(model, curve) + f"\nlast {number(points[-1][1], 1)}"
                    found.setdefault(f"{name} AP", []).append(Series(i, points, tip))
    return [(k, _over_iterations(k, f"validation {k}", s)) for k, s in found.items()]


def pr_plot(report: Report) -> tuple[list[list[str]], Markup | None]:
    """Precision over recall: what can be chosen (task, class, IoU), and the plot."""
    series, names = [], {"all classes": "all classes"}
    names |= {c: c for c in get(report, "data", "classes") or []}
    ious = {"50": "0.50", "75": "0.75", "mean": "mean of 0.50 to 0.95"}
    seen: set[tuple[str, str, str]] = set()
    for i, model in enumerate(report["models"]):
        for task, task_name in TASKS.items():
            curve = get(model, "pr_curves", task) or {}
            recall = curve.get("recall") or []
            sets = [("all classes", curve.get("all")), *(curve.get("classes") or {}).items()]
            for name, by_iou in sets:
                for iou, iou_name in ious.items():
                    points = _points(recall, get(by_iou, iou) or [])
                    if not points:
                        continue
                    names.setdefault(name, name)
                    seen.add((task_name, name, iou_name))
                    mean = sum(p for _, p in points) / len(points)
                    tip = f"{model['name']}\n{name}, IoU {iou_name}: AP {100 * mean:.1f}"
                    choice = f"{task_name}/{name}/{iou_name}"
                    series.append(Series(i, _corners(points), tip, choice))
    options = [
        [option for option in order if any(option == s[k] for s in seen)]
        for k, order in enumerate((list(TASKS.values()), list(names), list(ious.values())))
    ]
    if not series:
        return options, None
    x, y = Axis("recall", 0, 1), Axis("precision", 0, 1.02)
    return options, curves("precision over recall", x, y, series)


def time_plots(report: Report) -> list[tuple[str, Markup]]:
    """("batch N", bars of the mean time per image, split into the parts of an inference)."""
    plots = []
    models = report["models"]
    for batch in sorted({t["batch"] for m in models for t in m.get("latency") or []}):
        rows = []
        for i, model in enumerate(models):
            parts = get(latency(model, batch), "parts") or {}
            means = [(p, get(parts, p, "mean")) for p in PARTS]
            known = [(p, 1e3 * v) for p, v in means if v is not None]
            if known:
                rows.append((i, model["name"], known))
        if rows:
            plots.append((f"batch {batch}", _bars(f"batch {batch}", rows)))
    return plots


def _bars(choice: str, rows: Sequence[tuple[int, str, Sequence[tuple[str, float]]]]) -> Markup:
    longest = max(sum(v for _, v in parts) for _, _, parts in rows) or 1.0
    room = _WIDTH - 90.0
    children = []
    for row, (model, name, parts) in enumerate(rows):
        top = row * 44
        total = sum(v for _, v in parts)
        group = [text(0, top + 11, shorten(name, 60), fill="var(--ink)")]
        x = 0.0
        for part, value in parts:
            group.append(
                element(
                    "rect",
                    x=_round(x),
                    y=top + 17,
                    width=_round(max(0.0, room * value / longest)),
                    height=16,
                    fill=f"var(--part{list(PARTS).index(part)})",
                    data_tip=f"{name}\n{PARTS[part]}: {number(value)} ms"
                    f" ({value / (total or 1):.0%})",
                )
            )
            x += max(0.0, room * value / longest)
        group.append(text(x + 6, top + 30, f"{number(total)} ms"))
        children.append(element("g", *group, data_model=model))
    parts_legend = legend([(f"var(--part{k})", name) for k, name in enumerate(PARTS.values())], 0)
    chart = svg(_WIDTH, 44 * len(rows), *children)
    return below(parts_legend, chart, aria_label=f"mean time per image, {choice}")


def _over_iterations(
    choice: str, label: str, series: Sequence[Series], log_from: float = math.inf
) -> Markup:
    values = [v for s in series for _, v in s.points]
    y = Axis.around(label, values, log_from)
    if y.log:
        y = Axis(f"{label}, logarithmic", y.low, y.high, log=True)
    x = Axis("iterations", 0, 1.03 * max(i for s in series for i, _ in s.points) or 1)
    return curves(label, x, y, series, choice)


def _training_runs(model: Model) -> Iterable[tuple[dict, float]]:
    """Each curve with the iterations that the earlier stages of the same seed took."""
    done: dict[object, float] = {}
    for curve in model.get("training_curves") or []:
        offset = done.get(curve.get("seed"), 0.0)
        yield curve, offset
        seen = [*(curve.get("iteration") or []), *(get(curve, "validation", "iteration") or [])]
        done[curve.get("seed")] = offset + max((i for i in seen if finite(i)), default=0.0)


def _run_tip(model: Model, curve: dict) -> str:
    seed = f", seed {curve['seed']}" if curve.get("seed") is not None else ""
    stage = f", {curve['stage']}" if curve.get("stage") else ""
    return f"{model['name']}{seed}{stage}"


def _points(xs: Sequence, ys: Sequence, offset: float = 0.0) -> list[Point]:
    return [(x + offset, y) for x, y in zip(xs, ys) if finite(x) and finite(y)]


def _thin(points: Sequence[Point]) -> Sequence[Point]:
    step = math.ceil(len(points) / _MOST_POINTS)
    return points if step < 2 else [*points[:-1:step], points[-1]]


def _corners(points: Sequence[Point]) -> list[Point]:
    """Without the points between two others of the same height."""
    inner = zip(points, points[1:], points[2:])
    kept = [b for a, b, c in inner if not a[1] == b[1] == c[1]]
    return [points[0], *kept, points[-1]] if len(points) > 1 else list(points)


def _scaled(value: float | None, factor: float) -> float | None:
    return value * factor if finite(value) and value is not None and value > 0 else None


def _with_spread(cell: Cell) -> str:
    spread = "" if cell.spread is None else f" ± {number(cell.spread, 1)}"
    return number(cell.value, 1) + spread


def _place(x: Axis, y: Axis, point: Point) -> Point:
    width, height = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
    return _LEFT + width * x.at(point[0]), _TOP + height * (1 - y.at(point[1]))


def _frame(x: Axis, y: Axis) -> Markup:
    """Grid, numbers and names of the axes."""
    parts = []
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    for tick in y.ticks():
        _, at = _place(x, y, (x.low, tick))
        parts.append(_line((_LEFT, at), (right, at), stroke="var(--grid)"))
        parts.append(text(_LEFT - 6, at + 4, f"{tick:.6g}", "end"))
    for tick in x.ticks():
        at, _ = _place(x, y, (tick, y.low))
        parts.append(_line((at, bottom), (at, bottom + 4), stroke="var(--muted)"))
        parts.append(text(at, bottom + 17, _thousands(tick), "middle"))
    parts.append(_line((_LEFT, bottom), (right, bottom), stroke="var(--muted)"))
    parts.append(text(4, 14, y.label, fill="var(--ink)"))
    parts.append(text(right, _HEIGHT - 8, x.label, "end", fill="var(--ink)"))
    return join(*parts)


def _thousands(value: float) -> str:
    return f"{value / 1000:g}k" if value >= 10000 else f"{value:.6g}"


def _line(a: Point, b: Point, **attributes: object) -> Markup:
    ends = {"x1": _round(a[0]), "y1": _round(a[1]), "x2": _round(b[0]), "y2": _round(b[1])}
    return element("line", **ends, **attributes)


def _round(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
