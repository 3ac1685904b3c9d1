"""The report's charts: one Vega-Lite description each, for the page and for pictures.

Each chart has a parameter "shown", the names of the models that are drawn; the page sets it.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import altair as alt

from solo_d2.evaluation.oracle import KINDS

from .accuracy import TASKS

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
        "losses": _curves(report, names, "loss", _losses),
        "validation": _curves(report, names, "AP", _validation),
        "precision": _precision(report, names),
        "errors": _errors(report, names),
    }
    return {name: chart for name, chart in made.items() if chart is not None}


def _base(rows: Sequence[Row], names: Sequence[str]) -> alt.Chart:
    shown = alt.param(name="shown", value=list(names))
    return (
        alt.Chart(alt.Data(values=list(rows)), width="container", height=300)
        .add_params(shown)
        .transform_filter("indexof(shown, datum.model) >= 0")
    )


def _chosen(chart: alt.Chart, field: str, rows: Sequence[Row]) -> alt.Chart:
    """Show the rows whose ``field`` is what a select box says, first that of the first row."""
    options = list(dict.fromkeys(row[field] for row in rows))
    choice: dict[str, Any] = {"name": field, "value": options[0]}
    if len(options) > 1:
        choice["bind"] = alt.binding_select(options=options, name=f"{field} ")
    return chart.add_params(alt.param(**choice)).transform_filter(f"datum.{field} == {field}")


def _color(names: Sequence[str]) -> alt.Color:
    scale = alt.Scale(domain=list(names), range=[color_of(i) for i in range(len(names))])
    return alt.Color("model:N", scale=scale, legend=_LEGEND)


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
        for key, title, scale in (
            ("parameters", "millions of parameters", 1e-6),
            ("flops", "GFLOPs of the network", 1e-9),
        ):
            if model.get(key):
                costs[title] = [scale * model[key]] * 3
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
    base = _base(rows, names).encode(color=_color(names), tooltip=["model:N", "x:Q", "AP:Q"])
    base = _chosen(_chosen(base, "cost", rows), "task", rows)
    x = alt.X("x:Q", title="cost (select below)", scale=alt.Scale(zero=False, padding=20))
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
    colors = alt.Scale(domain=list(parts), range=[color_of(i + 3) for i in range(len(parts))])
    rows = [{**row, "order": parts.index(row["part"])} for row in rows]
    chart = _chosen(_base(rows, names), field, rows)
    return chart.mark_bar(height={"band": 0.6}).encode(
        x=alt.X("value:Q", title=what),
        y=alt.Y("model:N", sort=list(names), title=None),
        color=alt.Color("part:N", scale=colors, legend=_LEGEND),
        order="order:Q",
        tooltip=["model:N", "part:N", alt.Tooltip("value:Q", title=what, format=".1f")],
    )


def _time(report: Report, names: Sequence[str]) -> alt.Chart | None:
    """Mean time per image, stacked by part."""
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
    what = "mean time per image, ms"
    return _bars(rows, names, list(PART_TITLES.values()), "batch", what)


def _errors(report: Report, names: Sequence[str]) -> alt.Chart | None:
    """Points that each kind of error costs; "masks" is left out, as it contains localization."""
    kinds = [kind for kind in KINDS if kind != "masks"]
    rows = [
        {"model": model["name"], "part": kind, "metric": metric, "value": max(0.0, stat["mean"])}
        for model in report["models"]
        for kind in kinds
        for metric, stat in (model.get("errors") or {}).get(kind, {}).items()
        if stat["mean"] is not None
    ]
    return _bars(rows, names, kinds, "metric", "points that each kind of error costs")


def _curves(
    report: Report, names: Sequence[str], what: str, read: Callable[[Any], tuple[Any, Any]]
) -> alt.Chart | None:
    """Values over the iterations, one line for each training.

    Args:
        what: the name of the values.
        read: gives the iterations of a training curve and its values by name.
    """
    rows = []
    for model in report["models"]:
        offset, seed = 0, None  # iterations of the stages before
        for curve in model.get("training_curves", ()):
            offset = offset if curve["seed"] == seed and curve["stage"] else 0
            iterations, values = read(curve)
            row = {"model": model["name"], "training": f"seed {curve['seed']}"}
            for name, of_name in values.items():
                points = [(x, y) for x, y in zip(iterations, of_name) if y is not None]
                for x, y in points[:: max(1, len(points) // _MOST_POINTS)]:
                    rows.append(row | {what: name, "iteration": offset + x, "value": y})
            offset, seed = offset + curve["iteration"][-1] + 1, curve["seed"]
    if not rows:
        return None
    return (
        _chosen(_base(rows, names), what, rows)
        .mark_line(point=what == "AP")
        .encode(
            x=alt.X("iteration:Q"),
            y=alt.Y("value:Q", title=what, scale=alt.Scale(zero=what == "AP")),
            color=_color(names),
            detail=["model:N", "training:N"],
            tooltip=["model:N", "training:N", "iteration:Q", "value:Q"],
        )
    )


def _losses(curve: Mapping[str, Any]) -> tuple[list[int], dict[str, list]]:
    total = {"total_loss": curve["losses"]["total_loss"]}  # comes first
    return curve["iteration"], total | curve["losses"]


def _validation(curve: Mapping[str, Any]) -> tuple[list[int], dict[str, list]]:
    found = curve["validation"]
    titles = {"mask AP": "segm/AP", "box AP": "bbox/AP", "mIoU": "sem_seg/mIoU"}
    return found["iteration"], {title: found[k] for title, k in titles.items() if k in found}


def _precision(report: Report, names: Sequence[str]) -> alt.Chart | None:
    rows = []
    for model in report["models"]:
        for task, curves in (model.get("pr_curves") or {}).items():
            for name, values in curves.items():
                row = {"model": model["name"], "task": TASKS[task], "curve": name}
                for i, y in enumerate(values[::4]):
                    rows.append(row | {"recall": i / 25, "precision": y})
    if not rows:
        return None
    chart = _chosen(_chosen(_base(rows, names), "task", rows), "curve", rows)
    whole = alt.Scale(domain=[0, 1])
    return chart.mark_line().encode(
        x=alt.X("recall:Q", scale=whole),
        y=alt.Y("precision:Q", scale=whole),
        color=_color(names),
        order="recall:Q",
        tooltip=["model:N", "recall:Q", "precision:Q"],
    )
