"""The report's charts: one Vega-Lite description each, for the page and for pictures.

Each chart has a parameter "shown", the names of the models that are drawn; the page sets it.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import altair as alt

from .measure import PARTS

Report = Mapping[str, Any]
Row = dict[str, Any]

# Contrast above 3 with white and with the dark page.
COLORS = "#3b7dd8 #d9580d #2f9e44 #9c5fd6 #d6336c #0c8f9c #a87b00 #76808c #a9623a #5f8f00".split()
TASKS = {"segm": "mask", "bbox": "box"}
PART_TITLES = {
    "preprocess": "pre-processing",
    "network": "network",
    "nms": "NMS and assembly",
    "output": "output to masks",
}
_LEGEND = alt.Legend(orient="bottom", title=None, columns=3)
_MOST_POINTS = 300  # of a curve; more cannot be seen


def color_of(index: int) -> str:
    return COLORS[index % len(COLORS)]


def make_charts(report: Report) -> dict[str, alt.Chart]:
    """The charts that the report has data for, by name."""
    names = [m["name"] for m in report["models"]]
    made = {
        "accuracy": _accuracy(report, names),
        "time": _time(report, names),
        "losses": _curves(_loss_rows(report), names, "loss", "total_loss", zero=False),
        "validation": _curves(_validation_rows(report), names, "AP", "mask AP", zero=True),
        "precision": _precision(report, names),
    }
    return {name: chart for name, chart in made.items() if chart is not None}


def _base(rows: Sequence[Row], names: Sequence[str]) -> alt.Chart:
    shown = alt.param(name="shown", value=list(names))
    return (
        alt.Chart(alt.Data(values=list(rows)), width="container", height=300)
        .add_params(shown)
        .transform_filter("indexof(shown, datum.model) >= 0")
    )


def _chosen(chart: alt.Chart, field: str, rows: Sequence[Row], first: str) -> alt.Chart:
    """Show the rows whose ``field`` is what a select box says; no box for a single value."""
    options = list(dict.fromkeys(row[field] for row in rows))
    value = first if first in options else options[0]
    choice: dict[str, Any] = {"name": field, "value": value}
    if len(options) > 1:
        choice["bind"] = alt.binding_select(options=options, name=f"{field} ")
    return chart.add_params(alt.param(**choice)).transform_filter(f"datum.{field} == {field}")


def _color(names: Sequence[str]) -> alt.Color:
    scale = alt.Scale(domain=list(names), range=[color_of(i) for i in range(len(names))])
    return alt.Color("model:N", scale=scale, legend=_LEGEND)


def _accuracy(report: Report, names: Sequence[str]) -> alt.Chart | None:
    """AP over a cost: latency, parameters, operations, memory."""
    rows = []
    for model in report["models"]:
        costs = {
            **{
                f"ms per image, batch {x['batch']}": [
                    1e3 * x["total"][k] for k in ("median", "q1", "q3")
                ]
                for x in model.get("latency") or []
            },
            "millions of parameters": [(model.get("parameters") or 0) / 1e6] * 3,
            "GFLOPs of the network": [(model.get("flops") or 0) / 1e9] * 3,
        }
        for task, title in TASKS.items():
            ap = ((model.get("metrics") or {}).get(task) or {}).get("AP") or {}
            if ap.get("mean") is None:
                continue
            for cost, (x, low, high) in costs.items():
                if x:
                    spread = ap.get("std") or 0.0
                    row = {"model": model["name"], "cost": cost, "task": title, "x": x}
                    row |= {"low": low, "high": high, "AP": ap["mean"]}
                    rows.append(row | {"worst": ap["mean"] - spread, "best": ap["mean"] + spread})
    if not rows:
        return None
    base = _base(rows, names).encode(color=_color(names), tooltip=["model:N", "x:Q", "AP:Q"])
    base = _chosen(_chosen(base, "cost", rows, rows[0]["cost"]), "task", rows, "mask")
    x = alt.X("x:Q", title="cost (select below)", scale=alt.Scale(zero=False, padding=20))
    y = alt.Y("AP:Q", title="AP", scale=alt.Scale(zero=False, padding=20))
    return alt.layer(
        base.mark_rule().encode(x=alt.X("low:Q", title="cost (select below)"), x2="high:Q", y=y),
        base.mark_rule().encode(x=x, y=alt.Y("worst:Q", title="AP"), y2="best:Q"),
        base.mark_circle(size=110, opacity=1).encode(x=x, y=y),
        base.mark_text(align="left", dx=9, dy=-7).encode(x=x, y=y, text="model:N"),
    )


def _time(report: Report, names: Sequence[str]) -> alt.Chart | None:
    """Mean time per image, stacked by part."""
    rows = [
        {
            "model": model["name"],
            "batch": f"{timed['batch']}",
            "part": PART_TITLES[part],
            "order": PARTS.index(part),
            "ms": 1e3 * timed["parts"][part]["mean"],
        }
        for model in report["models"]
        for timed in model.get("latency") or []
        for part in timed.get("parts") or ()
    ]
    if not rows:
        return None
    parts = alt.Scale(domain=list(PART_TITLES.values()), range=COLORS[3:4] + COLORS[:3])
    chart = _chosen(_base(rows, names), "batch", rows, "1")
    return chart.mark_bar(height={"band": 0.6}).encode(
        x=alt.X("ms:Q", title="mean time per image, ms"),
        y=alt.Y("model:N", sort=list(names), title=None),
        color=alt.Color("part:N", scale=parts, legend=_LEGEND),
        order="order:Q",
        tooltip=["model:N", "part:N", alt.Tooltip("ms:Q", format=".1f")],
    )


def _curves(
    rows: Sequence[Row], names: Sequence[str], what: str, first: str, *, zero: bool
) -> alt.Chart | None:
    """A value over the iterations, one line for each training."""
    if not rows:
        return None
    chart = _chosen(_base(rows, names), what, rows, first)
    return chart.mark_line(point=zero).encode(
        x=alt.X("iteration:Q"),
        y=alt.Y("value:Q", title=what, scale=alt.Scale(zero=zero)),
        color=_color(names),
        detail="training:N",
        tooltip=["model:N", "training:N", "iteration:Q", "value:Q"],
    )


def _loss_rows(report: Report) -> list[Row]:
    rows = []
    for model, curve, offset in _trainings(report):
        for name, values in curve["losses"].items():
            pairs = zip(curve["iteration"], values)
            rows += [
                {**_of(model, curve), "loss": name, "iteration": offset + x, "value": y}
                for x, y in _thinned([(x, y) for x, y in pairs if y is not None])
            ]
    return rows


def _validation_rows(report: Report) -> list[Row]:
    rows = []
    for model, curve, offset in _trainings(report):
        for key, values in curve["validation"].items():
            if key == "iteration":
                continue
            title = f"{TASKS[key.split('/')[0]]} AP"
            rows += [
                {**_of(model, curve), "AP": title, "iteration": offset + x, "value": y}
                for x, y in zip(curve["validation"]["iteration"], values)
                if y is not None
            ]
    return rows


def _trainings(report: Report) -> Iterable[tuple[str, Mapping[str, Any], int]]:
    """Model, curve, and the iterations of the stages before it."""
    for model in report["models"]:
        offset, seed = 0, None
        for curve in model.get("training_curves") or []:
            offset = offset if curve["seed"] == seed and curve["stage"] else 0
            yield model["name"], curve, offset
            offset, seed = offset + curve["iteration"][-1] + 1, curve["seed"]


def _of(model: str, curve: Mapping[str, Any]) -> Row:
    stage = f", {curve['stage']}" if curve["stage"] else ""
    seed = "" if curve["seed"] is None else f", seed {curve['seed']}"
    return {"model": model, "training": f"{model}{seed}{stage}"}


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    return points[:: max(1, len(points) // _MOST_POINTS)]


def _precision(report: Report, names: Sequence[str]) -> alt.Chart | None:
    rows = []
    ious = {"50": "IoU 0.5", "75": "IoU 0.75", "mean": "mean over IoU 0.5 to 0.95"}
    for model in report["models"]:
        for task, found in (model.get("pr_curves") or {}).items():
            curves = {f"{name}, IoU 0.5": x["50"] for name, x in found["classes"].items()}
            if "all" in found:
                curves |= {f"all classes, {ious[key]}": x for key, x in found["all"].items()}
            for name, values in curves.items():
                row = {"model": model["name"], "task": TASKS[task], "curve": name}
                points = list(zip(found["recall"], values))[::4]
                rows += [{**row, "recall": x, "precision": y} for x, y in points]
    if not rows:
        return None
    chart = _chosen(_base(rows, names), "task", rows, "mask")
    chart = _chosen(chart, "curve", rows, f"all classes, {ious['50']}")
    whole = alt.Scale(domain=[0, 1])
    return chart.mark_line().encode(
        x=alt.X("recall:Q", scale=whole),
        y=alt.Y("precision:Q", scale=whole),
        color=_color(names),
        order="recall:Q",
        tooltip=["model:N", "recall:Q", "precision:Q"],
    )
