"""The report as one page that needs nothing else: style, script and images are inside."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from solo_d2.tools.compare import plots, summary
from solo_d2.tools.compare.gallery import MATCH_IOU, MOST_OBJECTS, Entry, score_threshold
from solo_d2.tools.compare.markup import Markup, element, escape, join
from solo_d2.tools.compare.summary import MISSING, TASKS, Column, Report, get, number

# Of the gallery, in characters: with it the page stays below about 10 MB.
_GALLERY_BUDGET = 7_000_000
# Nothing is loaded, whatever the names in the report are.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
_GROUPS = {
    "forbidden": "Not allowed in a fair comparison",
    "backbone": "Backbone: allowed, but no property of the architecture",
    "listed": "Allowed, as they belong to the architecture",
    "stages": "Later stages of a training in stages",
    "evaluation only": "Training settings, of no effect as nothing was trained",
    "model": "The architectures themselves",
}


def page(report: Report, gallery: Sequence[Entry]) -> str:
    """The whole page; ``gallery`` in the order in which it is shown."""
    title = summary.title(report)
    css, script = (
        Path(__file__).with_name(name).read_text("utf-8") for name in ("page.css", "page.js")
    )
    sections = [
        ("results", "Results", _results(report)),
        ("speed", "Accuracy and cost", _accuracy(report)),
        ("time", "Where the time goes", _time(report)),
        ("training", "Training", _training(report)),
        ("pr", "Precision and recall", _precision_recall(report)),
        ("classes", "Per class", _per_class(report)),
        ("gallery", "Gallery", _gallery(report, gallery)),
        ("configs", "Differences between the configs", _differences(report)),
        ("about", "What these numbers can and cannot tell", _about(report)),
    ]
    sections = [(key, name, body) for key, name, body in sections if body]
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", title),
        element("style", Markup(_variables() + css)),
    )
    links = [element("a", name, href=f"#{key}") for key, name, _ in sections]
    body = element(
        "body",
        element(
            "header",
            element("h1", title),
            element("p", summary.data_sentence(report)),
            element("p", summary.state(report), f" Written {report.get('created')}.", class_="m"),
            *_warnings(report),
            element("nav", *links, aria_label="Sections"),
        ),
        _toggles(report),
        element(
            "main",
            *(element("section", element("h2", n), b, id=key) for key, n, b in sections),
        ),
        element("div", id="tip", role="status", hidden=True),
        element(
            "dialog",
            element("form", element("button", "Close"), method="dialog"),
            element("div"),
            id="zoom",
        ),
        element("script", Markup(script)),
    )
    return "<!DOCTYPE html>\n" + element("html", head, body, lang="en") + "\n"


def _variables() -> str:
    light, dark = ("".join(f"--{k}:{v[i]};" for k, v in plots.COLORS.items()) for i in (0, 1))
    return f":root{{{light}}}@media(prefers-color-scheme:dark){{:root{{{dark}}}}}\n"


def _warnings(report: Report) -> list[Markup]:
    boxes = []
    forbidden = summary.forbidden(report)
    if forbidden:
        text = "The configs differ in what a fair comparison holds equal:"
        table = _difference_table(report, forbidden)
        boxes.append(element("div", element("p", element("strong", text)), table, class_="bad"))
    for model in report["models"]:
        if model.get("status") == "failed":
            error = element("code", model.get("error") or "no message")
            text = join(element("strong", model["name"], " failed: "), error)
            boxes.append(element("div", element("p", text), class_="bad"))
    return boxes


def _swatch(index: int) -> Markup:
    return element("i", class_="swatch", style=f"background:{plots.color(index)}")


def _toggles(report: Report) -> Markup:
    labels = [
        element(
            "label",
            element("input", type="checkbox", checked=True, data_toggle=i),
            _swatch(i),
            m["name"],
        )
        for i, m in enumerate(report["models"])
    ]
    return element("div", *labels, id="models", role="group", aria_label="Models that are shown")


def _scroll(table: Markup, label: str, **attributes: object) -> Markup:
    """A table may be wider than the screen: it scrolls by itself, by keyboard too."""
    names = {"role": "region", "aria_label": label, "class_": "scroll", **attributes}
    return element("div", table, tabindex=0, **names)


def _sort_header(title: object, note: str = "", better: str = "", **more: object) -> Markup:
    button = element("button", title, type="button", title=note or None)
    return element("th", button, scope="col", data_better=better or None, **more)


def _model_header(report: Report, index: int) -> Markup:
    name = _breakable(report["models"][index]["name"])
    return element("span", _swatch(index), name, class_="name")


def _breakable(name: str) -> Markup:
    """A narrow column may break the name after an underscore, a dot or a slash."""
    return Markup("<wbr>".join(map(escape, re.split(r"(?<=[_./])", name))))


def _table(report: Report, columns: Sequence[Column], label: str, **attributes: object) -> Markup:
    """Models x columns."""
    models = report["models"]
    groups: list[list[Any]] = []
    for column in columns:
        if groups and groups[-1][0] == column.group:
            groups[-1][1] += 1
        else:
            groups.append([column.group, 1])
    first = [element("th", name, colspan=n, scope="colgroup") for name, n in groups]
    heads = [_sort_header(c.title, c.note, c.better) for c in columns]
    best = [c.best(models) for c in columns]
    rows = []
    for i, model in enumerate(models):
        state = model.get("status")
        note = "" if state == "finished" else f", {state}"
        name = element(
            "th",
            _model_header(report, i),
            element("small", f"{model.get('architecture') or ''}{note}"),
            scope="row",
            data_v=model["name"],
        )
        cells = [_value_cell(c, c.read(model), i in b) for c, b in zip(columns, best)]
        rows.append(element("tr", name, *cells, data_model=i))
    head = element(
        "thead",
        element("tr", element("td"), *first),
        element("tr", _sort_header("model"), *heads),
    )
    table = element("table", head, element("tbody", *rows), class_="sortable")
    return _scroll(table, label, **attributes)


def _value_cell(column: Column, cell: summary.Cell, best: bool) -> Markup:
    spread = None
    if cell.spread is not None:
        spread = element("small", f"±{number(cell.spread, column.digits)}")
    mark = element("span", " best", class_="sr") if best else None
    return element(
        "td",
        column.text(cell.value),
        mark,
        spread,
        class_="best" if best else None,
        data_v="" if cell.value is None else cell.value,
        data_tip=cell.tip or None,
    )


def _results(report: Report) -> Markup:
    columns = summary.summary_columns(report)
    if not columns:
        return element("p", "Nothing is measured yet.")
    note = (
        "Click a heading to sort; the best value of each column is bold. AP and AR in percent,"
        " COCO's definition."
    )
    more = []
    for task in summary.tasks(report):
        label = f"{TASKS[task]} metrics".capitalize()
        more += [
            element("h3", label),
            _table(report, summary.metric_columns(report, task), label),
        ]
    return join(
        _table(report, columns, "Results"),
        element("p", note, class_="m"),
        element("details", element("summary", "All COCO metrics"), *more) if more else None,
    )


def _choices(selects: Mapping[str, Sequence[str]], *children: object) -> Markup:
    """Children with ``data_choice`` are shown when it is what the selects say, joined by "/"."""
    fields = [
        element(
            "label",
            f"{label} ",
            element("select", *(element("option", o) for o in options)),
            hidden=len(options) < 2,
        )
        for label, options in selects.items()
    ]
    return element("div", element("div", *fields, class_="fields"), *children, class_="choices")


def _figures(label: str, charts: Sequence[tuple[str, Markup]]) -> Markup:
    """One chart at a time, chosen by its name."""
    return _choices({label: [name for name, _ in charts]}, *(chart for _, chart in charts))


def _grid(*figures: Markup | None) -> Markup:
    return element("div", *figures, class_="grid")


def _accuracy(report: Report) -> Markup | None:
    charts = plots.accuracy_plots(report)
    if not charts:
        return None
    text = (
        "Up and to the left is better. Bars: the standard deviation over seeds, and the quartiles"
        " of the latency."
    )
    # The same charts twice, so that two can be seen side by side.
    orders = [[charts[i], *charts[:i], *charts[i + 1 :]] for i in range(min(2, len(charts)))]
    figures = [_figures("Show", order) for order in orders]
    return join(_grid(*figures), element("p", text, class_="m"))


def _time(report: Report) -> Markup | None:
    charts = plots.time_plots(report)
    if not charts:
        return None
    figures = [element("div", element("h3", name.capitalize()), chart) for name, chart in charts]
    text = "Mean time per image in each part of an inference; the parts add up to the whole."
    return join(_grid(*figures), element("p", text, class_="m"))


def _training(report: Report) -> Markup | None:
    losses, validation = plots.loss_plots(report), plots.validation_plots(report)
    if not losses and not validation:
        return None
    text = (
        "Each architecture has losses of its own: compare the courses, not the heights. One line"
        " for each seed."
    )
    return join(
        _grid(
            _figures("Loss", losses) if losses else None,
            _figures("Validation", validation) if validation else None,
        ),
        element("p", text, class_="m"),
    )


def _precision_recall(report: Report) -> Markup | None:
    options, chart = plots.pr_plot(report)
    if chart is None:
        return None
    return _grid(_choices(dict(zip(("Task", "Class", "IoU"), options)), chart))


def _per_class(report: Report) -> Markup | None:
    tasks = summary.tasks(report, "per_class")
    if not tasks:
        return None
    tables = [_heat_map(report, task, f"{TASKS[task]} AP") for task in tasks]
    return _choices({"Show": [f"{TASKS[task]} AP" for task in tasks]}, *tables)


def _heat_map(report: Report, task: str, choice: str) -> Markup:
    """Classes x models; the color is the value, relative to the largest of the table."""
    models = range(len(report["models"]))
    found = [get(m, "per_class", task) or {} for m in report["models"]]
    names = [c for c in get(report, "data", "classes") or [] if any(c in f for f in found)]
    names = list(dict.fromkeys([*names, *(c for f in found for c in f)]))
    table = [[summary.statistic(f.get(name)) for f in found] for name in names]
    top = max((c.value for row in table for c in row if c.value), default=1.0)
    rows = []
    for name, row in zip(names, table):
        values = [c.value for c in row if c.value is not None]
        shown = {number(v, 1) for v in values}
        best = number(max(values), 1) if len(shown) > 1 else None
        cells = []
        for i, cell in zip(models, row):
            text = number(cell.value, 1)
            kind = "heat best" if text == best else "heat"
            value = "" if cell.value is None else cell.value
            style = f"--v:{max(0.0, cell.value or 0.0) / top:.0%}"
            more = {"class_": kind, "style": style, "data_v": value, "data_model": i}
            cells.append(element("td", text, data_tip=cell.tip or None, **more))
        spread = max(values) - min(values) if len(values) > 1 else None
        last = element("td", number(spread, 1), data_v="" if spread is None else spread)
        head = element("th", name, scope="row", data_v=name)
        rows.append(element("tr", head, *cells, last))
    heads = [_sort_header(_model_header(report, i), better="max", data_model=i) for i in models]
    last = _sort_header("range", "largest minus smallest", "max")
    return _scroll(
        element(
            "table",
            element("thead", element("tr", _sort_header("class"), *heads, last)),
            element("tbody", *rows),
            class_="sortable",
        ),
        f"{choice} per class",
        data_choice=choice,
    )


def _differences(report: Report) -> Markup | None:
    """By group; those not allowed are at the top of the page already."""
    parts = []
    for group, title in _GROUPS.items():
        found = [d for d in report.get("differences") or [] if d.get("group") == group]
        if found and group != "forbidden":
            text = f"{title} ({len(found)})"
            table = _difference_table(report, found)
            opened = group not in ("model", "evaluation only")
            parts.append(element("details", element("summary", text), table, open=opened))
    if not parts and len(report["models"]) < 2:
        return None
    return join(*parts) if parts else element("p", "None.")


def _difference_table(report: Report, differences: Sequence[Mapping[str, Any]]) -> Markup:
    names = [m["name"] for m in report["models"]]
    reasons = any(d.get("reason") for d in differences)
    head = [element("th", "key", scope="col")]
    head += [
        element("th", _model_header(report, i), scope="col", data_model=i)
        for i in range(len(names))
    ]
    head += [element("th", "why", scope="col")] if reasons else []
    rows = []
    for difference in differences:
        values = difference.get("values") or {}
        cells = [
            element("td", setting(values.get(name)), data_model=i) for i, name in enumerate(names)
        ]
        why = element("td", difference.get("reason") or "", class_="why") if reasons else None
        key = element("th", element("code", _breakable(difference["key"])), scope="row")
        rows.append(element("tr", key, *cells, why))
    table = element(
        "table", element("thead", element("tr", *head)), element("tbody", *rows), class_="settings"
    )
    return _scroll(table, "Differences")


def setting(value: object) -> str:
    """A value of a config."""
    if value is None or value == "":
        return MISSING
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _gallery(report: Report, gallery: Sequence[Entry]) -> Markup | None:
    figures: list[Markup] = []
    definitions: list[Markup] = []
    size = 0
    for entry in gallery:
        definition, figure = entry.definition(), _gallery_figure(entry)
        size += len(definition) + len(figure)
        if figures and size > _GALLERY_BUDGET:
            break
        definitions.append(definition)
        figures.append(figure)
    if not figures:
        return None
    threshold = score_threshold(report)
    slider = element(
        "label",
        "Scores from ",
        element(
            "input", type="range", id="score", min="0.05", max="0.95", step="0.05", value=threshold
        ),
        " ",
        element("output", f"{threshold:.2f}", for_="score"),
    )
    count = f"{len(figures)} of {len(report['gallery'])}"
    text = (
        f"Images shown: {count}, largest disagreement first. An object has the same"
        f" color in every panel; what covers no object (IoU below {MATCH_IOU:g}) or one that a"
        f" better detection has found is pink and dashed. At most {MOST_OBJECTS} detections per"
        f" panel. Disagreement and mean IoU are for scores from {threshold:.2f}. Click a panel to"
        " enlarge it."
    )
    return join(
        element("p", text, class_="m"),
        element("div", slider, class_="fields"),
        element("svg", element("defs", *definitions), width=0, height=0, class_="defs"),
        *figures,
    )


def _gallery_figure(entry: Entry) -> Markup:
    cells = []
    for panel in entry.panels:
        caption = [_swatch(panel.model)] if panel.model is not None else []
        caption += [element("b", panel.name), element("small", panel.note)]
        button = element(
            "button",
            panel.picture,
            type="button",
            class_="enlarge",
            aria_label=f"Enlarge {entry.file_name}, {panel.name}",
        )
        cells.append(
            element("div", element("div", *caption, class_="cap"), button, data_model=panel.model)
        )
    disagreement = entry.entry.get("disagreement")
    note = f"disagreement {disagreement:.2f}" if summary.finite(disagreement) else ""
    title = element("figcaption", entry.file_name, " ", element("small", note))
    return element("figure", title, element("div", *cells, class_="panels"))


def _about(report: Report) -> Markup:
    facts = [*(report.get("environment") or {}).items(), *(report.get("settings") or {}).items()]
    return join(
        element("ul", *(element("li", line) for line in summary.caveats(report))),
        element("h3", "Command"),
        element("pre", report.get("command") or ""),
        element("h3", "Configs"),
        _facts([(m["name"], _origin(m)) for m in report["models"]]),
        element("h3", "Machine and settings"),
        _facts(facts),
    )


def _facts(facts: Sequence[tuple[str, object]]) -> Markup:
    rows = [element("tr", element("th", k), element("td", setting(v))) for k, v in facts]
    return element("table", element("tbody", *rows), class_="facts")


def _origin(model: Mapping[str, Any]) -> str:
    """Config, weights and input of a model."""
    parts = [str(model.get("config") or "")]
    if model.get("weights"):
        parts.append(f"weights {model['weights']}")
    if model.get("input_size"):
        parts.append("input {} x {}".format(*model["input_size"]))
    if model.get("flops_error"):
        parts.append(f"FLOPs not counted: {model['flops_error']}")
    return "; ".join(part for part in parts if part)
