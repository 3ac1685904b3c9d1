"""The report's charts: one Vega-Lite description each, for the page and for pictures.

Each chart has a parameter "shown", the names of the models that are drawn; the page sets it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

from solo_d2.evaluation.oracle import KINDS

from .accuracy import MAIN_METRICS, TASKS

Report = Mapping[str, Any]
Row = dict[str, Any]

# Contrast above 3 with white and with the dark page.
COLORS = "#3b7dd8 #d9580d #2f9e44 #9c5fd6 #d6336c #0c8f9c #a87b00 #76808c #a9623a #5f8f00".split()
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


def make_charts(report: Report) -> dict[str, Any]:
    """The Altair charts that the report has data for, by name."""
    names = [m["name"] for m in report["models"]]
    made = {
        "accuracy": _accuracy(report, names),
        "time": _time(report, names),
        "losses": _curves(report, names, "loss"),
        "validation": _curves(report, names, "AP"),
        "precision": _precision(report, names),
        "errors": _errors(report, names),
    }
    return {name: chart for name, chart in made.items() if chart is not None}


def _base(rows: Sequence[Row], names: Sequence[str], *fields: str) -> alt.Chart:
    """Shows the rows of shown models whose fields are what select boxes say, first the first row's.

    Each field has a box if it has several values.
    """
    chart = alt.Chart(alt.Data(values=list(rows)), width="container", height=300)
    chart = chart.add_params(alt.param(name="shown", value=list(names)))
    chart = chart.transform_filter("indexof(shown, datum.model) >= 0")
    for field in fields:
        options = list(dict.fromkeys(row[field] for row in rows))
        choice: dict[str, Any] = {"name": field, "value": options[0]}
        if len(options) > 1:
            choice["bind"] = alt.binding_select(options=options, name=f"{field} ")
        chart = chart.add_params(alt.param(**choice)).transform_filter(f"datum.{field} == {field}")
    return chart


def _color(names: Sequence[str], field: str = "model", first: int = 0) -> alt.Color:
    colors = [color_of(i + first) for i in range(len(names))]
    scale = alt.Scale(domain=list(names), range=colors)
    return alt.Color(f"{field}:N", scale=scale, legend=_LEGEND)


def _accuracy(report: Report, names: Sequence[str]) -> Any:
    """AP over a cost: latency, parameters, operations."""
    rows = []
    for model in report["models"]:
        costs = {
            f"ms per image, batch {x['batch']}": [
                1e3 * x["total"][k] for k in ("median", "q1", "q3")
            ]
            for x in model["latency"]
        }
        if model.get("parameters"):
            costs["millions of parameters"] = [1e-6 * model["parameters"]] * 3
        if model.get("flops"):
            costs["GFLOPs of the network"] = [1e-9 * model["flops"]] * 3
        for task, title in TASKS.items():
            ap = model["metrics"].get(task, {}).get("AP", {"mean": None})
            if ap["mean"] is None:
                continue
            spread = ap["std"] or 0.0
            row = {"model": model["name"], "task": title, "AP": ap["mean"]}
            row |= {"worst": ap["mean"] - spread, "best": ap["mean"] + spread}
            for cost, (x, low, high) in costs.items():
                rows.append(row | {"cost": cost, "x": x, "low": low, "high": high})
    if not rows:
        return None
    base = _base(rows, names, "cost", "task")
    base = base.encode(color=_color(names), tooltip=["model:N", "x:Q", "AP:Q"])
    x = alt.X("x:Q", title="cost (select below)", scale=alt.Scale(zero=False, padding=45))
    y = alt.Y("AP:Q", title="AP", scale=alt.Scale(zero=False, padding=20))
    return alt.layer(
        base.mark_rule().encode(x=alt.X("low:Q", title="cost (select below)"), x2="high:Q", y=y),
        base.mark_rule().encode(x=x, y=alt.Y("worst:Q", title="AP"), y2="best:Q"),
        base.mark_circle(size=110, opacity=1).encode(x=x, y=y),
        base.mark_text(align="left", dx=9, dy=-7).encode(x=x, y=y, text="model:N"),
    )


def _bars(
    rows: Sequence[Row], names: Sequence[str], parts: Sequence[str], field: str, what: str
) -> alt.Chart | None:
    """A bar for each model, stacked from the values of its parts."""
    if not rows:
        return None
    rows = [{**row, "order": parts.index(row["part"])} for row in rows]
    chart = _base(rows, names, field)
    return chart.mark_bar(height={"band": 0.6}).encode(
        x=alt.X("value:Q", title=what),
        y=alt.Y("model:N", sort=list(names), title=None),
        color=_color(parts, "part", first=3),
        order="order:Q",
        tooltip=["model:N", "part:N", alt.Tooltip("value:Q", title=what, format=".1f")],
    )


def _time(report: Report, names: Sequence[str]) -> alt.Chart | None:
    rows = [
        {
            "model": model["name"],
            "batch": f"{timed['batch']}",
            "part": PART_TITLES[part],
            "value": 1e3 * stat["mean"],
        }
        for model in report["models"]
        for timed in model["latency"]
        for part, stat in timed["parts"].items()
    ]
    return _bars(rows, names, list(PART_TITLES.values()), "batch", "mean time per image, ms")


def _errors(report: Report, names: Sequence[str]) -> alt.Chart | None:
    """Points that each kind of error costs; "masks" is left out, as it contains localization."""
    kinds = [kind for kind in KINDS if kind != "masks"]
    rows = [
        {"model": model["name"], "part": kind, "metric": metric, "value": max(0.0, stat["mean"])}
        for model in report["models"]
        for kind in kinds
        for metric, stat in model.get("errors", {}).get(kind, {}).items()
        if stat["mean"] is not None
    ]
    return _bars(rows, names, kinds, "metric", "points that each kind of error costs")


def _curves(report: Report, names: Sequence[str], what: str) -> alt.Chart | None:
    """Losses or APs over the iterations, one line for each training."""
    rows = []
    for model in report["models"]:
        offset, seed = 0, None  # iterations of the stages before
        for curve in model.get("training_curves", ()):
            offset = offset if curve["seed"] == seed and curve["stage"] else 0
            validation, losses = curve["validation"], curve["losses"]
            iterations = (curve if what == "loss" else validation)["iteration"]
            values = {"total_loss": losses["total_loss"]} | losses  # the total comes first
            if what == "AP":
                keys = {title: "/".join(metric) for title, metric in MAIN_METRICS.items()}
                values = {title: validation[k] for title, k in keys.items() if k in validation}
            row = {"model": model["name"], "training": f"seed {curve['seed']}"}
            for name, of_name in values.items():
                points = [(x, y) for x, y in zip(iterations, of_name) if y is not None]
                for x, y in points[:: max(1, len(points) // _MOST_POINTS)]:
                    rows.append(row | {what: name, "iteration": offset + x, "value": y})
            offset, seed = offset + curve["iteration"][-1] + 1, curve["seed"]
    if not rows:
        return None
    chart = _base(rows, names, what).mark_line(point=what == "AP")
    return chart.encode(
        x=alt.X("iteration:Q"),
        y=alt.Y("value:Q", title=what, scale=alt.Scale(zero=what == "AP")),
        color=_color(names),
        detail=["model:N", "training:N"],
        tooltip=["model:N", "training:N", "iteration:Q", "value:Q"],
    )


def _precision(report: Report, names: Sequence[str]) -> alt.Chart | None:
    rows = [
        {"model": model["name"], "task": TASKS[t], "curve": name, "recall": i / 25, "precision": y}
        for model in report["models"]
        for t, curves in (model.get("pr_curves") or {}).items()
        for name, values in curves.items()
        for i, y in enumerate(values[::4])
    ]
    if not rows:
        return None
    whole = alt.Scale(domain=[0, 1])
    return (
        _base(rows, names, "task", "curve")
        .mark_line()
        .encode(
            x=alt.X("recall:Q", scale=whole),
            y=alt.Y("precision:Q", scale=whole),
            color=_color(names),
            order="recall:Q",
            tooltip=["model:N", "recall:Q", "precision:Q"],
        )
    )
