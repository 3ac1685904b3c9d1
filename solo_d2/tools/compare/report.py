"""report.html, report.md, the CSV files and the figures of a comparison: see ``write_report``."""

import base64
import csv
import io
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import jinja2
import numpy as np
import vl_convert
from markupsafe import Markup

from solo_d2.data.images import read_image
from solo_d2.drawing import draw_masks, instance_color
from solo_d2.files import atomic_write

from .accuracy import match, overlaps
from .charts import TASKS, color_of, make_charts

Report = Mapping[str, Any]
Model = Mapping[str, Any]

METRICS = {
    "AP": "average precision, mean over IoU 0.50 to 0.95",
    "AP50": "average precision at IoU 0.50",
    "AP75": "average precision at IoU 0.75",
    "APs": "AP of small objects, below 32 x 32 pixels",
    "APm": "AP of medium objects",
    "APl": "AP of large objects, above 96 x 96 pixels",
    "AR1": "average recall with 1 detection per image",
    "AR10": "average recall with 10 detections per image",
    "AR100": "average recall with 100 detections per image",
    "ARs": "average recall of small objects",
    "ARm": "average recall of medium objects",
    "ARl": "average recall of large objects",
}
_IN_SUMMARY = [("segm", k) for k in ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR100")]
GROUPS = {
    "forbidden": "Not allowed in a fair comparison",
    "backbone": "Backbone: allowed, but not a property of the architecture",
    "listed": "Allowed, as they belong to the architecture",
    "rates": "The learning rate, of which each model has its best",
    "stages": "Later stages of a training in stages",
    "evaluation only": "Training settings, without effect because nothing was trained",
    "model": "The architectures themselves",
}
_PANEL_SIDE = 480  # pixels of a gallery panel's longer side, at most
# Of the gallery, in bytes: with it the page stays below about 10 MB.
_GALLERY_BUDGET = 6_000_000
_UNMATCHED, _CROWD = (255, 59, 141), (154, 164, 174)
_FIGURES = {"accuracy": "Accuracy and cost", "time": "Time per image", "losses": "Training loss"}
MISSING = "-"


@dataclass(frozen=True)
class Cell:
    """A value of a table; ``spread`` is the standard deviation over seeds."""

    value: float | None
    spread: float | None = None
    tip: str = ""


@dataclass(frozen=True)
class Column:
    title: str
    note: str
    read: Callable[[Model], Cell]
    better: str  # "max" or "min"
    digits: int | None = None  # None: three significant digits

    def text(self, value: float | None) -> str:
        return number(value, self.digits)

    def best(self, models: Sequence[Model]) -> set[int]:
        """Indices of the best models, as far as the digits shown tell; none when all are alike."""
        known = {i: v for i, m in enumerate(models) if (v := self.read(m).value) is not None}
        if not known:
            return set()
        top = self.text((max if self.better == "max" else min)(known.values()))
        best = {i for i, v in known.items() if self.text(v) == top}
        return best if len(best) < len(known) else set()


def write_report(report: dict[str, Any], folder: Path) -> None:
    """Write report.html, report.md, per_class.csv and figures/ of what is measured so far.

    Args:
        report: the content of report.json; whatever is not measured yet is None, empty or absent.
        folder: exists. Each file is replaced in one step, so that it is whole at any time.
    """
    charts = make_charts(report)
    gallery = _gallery(report)
    context = _context(report) | {
        "charts": {name: chart.to_dict() for name, chart in charts.items()},
        "gallery": gallery,
        "javascript": vl_convert.javascript_bundle() if charts else "",
        "figures": _write_figures(charts, gallery, folder / "figures"),
    }
    for name in ("report.html", "report.md"):
        environment = _environment(escape_html=name.endswith("html"))
        _write(folder / name, environment.get_template(f"{name}.j2").render(context))
    _write(folder / "per_class.csv", per_class_csv(report))


def _environment(*, escape_html: bool) -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=escape_html,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"md": _markdown, "setting": setting, "number": number}
    environment.filters["script_json"] = lambda x: Markup(json.dumps(x).replace("<", "\\u003c"))
    return environment


def _context(report: Report) -> dict[str, Any]:
    models = report["models"]
    names = [m["name"] for m in models]
    columns = summary_columns(report)
    differences = report.get("differences") or []
    return {
        "title": f"Comparison on {', '.join(_get(report, 'data', 'test') or []) or 'no data'}",
        "report": report,
        "models": models,
        "names": names,
        "colors": [color_of(i) for i in range(len(names))],
        "winner": winner_sentence(report),
        "data_sentence": data_sentence(report),
        "state": state(report),
        "caveats": caveats(report),
        "summary": _table(models, columns),
        "rates": _rate_table(models),
        "metrics": {TASKS[t]: _table(models, metric_columns(models, t)) for t in _tasks(models)},
        "per_class": {TASKS[t]: _per_class(report, t) for t in _tasks(models)},
        "confusion": [_confusion(report, m) for m in models if m.get("confusion")],
        "best_f1": {TASKS[t]: _best_f1(models, t) for t in _tasks(models)},
        "errors": [(m["name"], m["errors"]) for m in models if m.get("errors")],
        "forbidden": [d for d in differences if d["group"] == "forbidden"],
        "differences": {
            title: found
            for group, title in GROUPS.items()
            if (found := [d for d in differences if d["group"] == group])
        },
        "facts": {**(report.get("environment") or {}), **(report.get("settings") or {})},
    }


def _get(mapping: Any, *keys: str) -> Any:
    """``mapping[key][key]...``, None where something is missing on the way."""
    for key in keys:
        mapping = mapping.get(key) if isinstance(mapping, Mapping) else None
    return mapping


def number(value: float | None, digits: int | None = None) -> str:
    """With ``digits`` decimals, or with three significant digits and never an exponent."""
    if value is None or not math.isfinite(value):
        return MISSING
    if digits is None:
        magnitude = math.floor(math.log10(abs(value))) if value else 0
        digits = min(6, max(0, 2 - magnitude))
    return f"{value:,.{digits}f}"


def setting(value: object) -> str:
    """A value of a config."""
    if value is None or value == "":
        return MISSING
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def summary_columns(report: Report) -> list[Column]:
    """The columns of the main table; those for which no model has a value are left out."""
    models = report["models"]
    cuda = any(_get(m, "memory", "device") == "cuda" for m in models)
    memory = (
        "peak of the tensors on the GPU" if cuda else "peak of a process, without the libraries"
    )
    columns = [_metric(task, key) for task, key in _IN_SUMMARY] + [_metric("bbox", "AP")]
    columns += [
        _plain("params, M", "millions of parameters", 1e-6, "parameters"),
        _plain("GFLOPs", "multiply-adds of the network", 1e-9, "flops"),
        _plain("GFLOPs after", "multiply-adds after the network", 1e-9, "flops_post"),
        _plain("found", "detections per image when operations were counted", 1, "detections"),
    ]
    for batch in sorted({t["batch"] for m in models for t in m.get("latency") or []}):
        columns.append(_latency(batch))
    columns += [_memory("inference", memory), _memory("training", memory)]
    columns += [
        _step("step", "step, ms", "one training step, timed in turns with the other models"),
        _step("seconds_per_iteration", "iteration, ms", "median of the training's log"),
        Column("training, min", "iterations times the logged time of one", _total, "min"),
    ]
    return _with_values(columns, models)


def metric_columns(models: Sequence[Model], task: str) -> list[Column]:
    """All COCO metrics of a task that any model has."""
    return _with_values([_metric(task, key) for key in METRICS], models)


def winner_sentence(report: Report) -> str:
    """Who is best by mask AP and by how much, in one sentence."""
    column = _metric("segm", "AP")
    known = [
        (c.value, m["name"]) for m in report["models"] if (c := column.read(m)).value is not None
    ]
    if len(known) < 2:
        return ""
    (best, name), (second, other) = sorted(known, reverse=True)[:2]
    if number(best, 1) == number(second, 1):
        return f"{name} and {other} have the same mask AP, {number(best, 1)}."
    lead = number(best - second, 1)
    return f"{name} has the highest mask AP, {number(best, 1)}: {lead} more than {other}."


def data_sentence(report: Report) -> str:
    """What was trained and evaluated on what."""
    data, models = report.get("data") or {}, report["models"]
    text = f"{_counted(len(models), 'model')} evaluated on {', '.join(data.get('test') or [])}"
    sizes = {"image": data.get("images"), "object": data.get("instances")}
    known = [_counted(n, what) for what, n in sizes.items() if n is not None]
    text += f" ({', '.join(known)})" if known else ""
    if _get(report, "settings", "train"):
        text += f", trained on {', '.join(data.get('train') or [])}"
        text += f" ({_counted(data['images_train'], 'image')})" if data.get("images_train") else ""
    return text + "."


def state(report: Report) -> str:
    """Whether the comparison is complete; otherwise how far it is."""
    statuses = [m.get("status") for m in report["models"]]
    failed, done = statuses.count("failed"), statuses.count("finished")
    text = (
        "Finished" if report.get("finished") else f"Not finished: {done} of {len(statuses)} models"
    )
    return text + (f", {failed} failed." if failed else ".")


def caveats(report: Report) -> list[str]:
    """What the numbers can and cannot tell, for this very comparison."""
    models = report["models"]
    runs = {len(m.get("seeds") or []) for m in models if m.get("metrics")} - {0}
    lines = []
    if runs and max(runs) > 1:
        lines.append(
            f"Accuracy is the mean ± the sample standard deviation over up to {max(runs)} trainings"
            " with different seeds. So few runs give a rough standard deviation: read differences"
            " of about its size as undecided."
        )
    if 1 in runs or (not runs and any(m.get("metrics") for m in models)):
        whose = "One training" if 1 in runs else "One set of weights"
        lines.append(
            f"{whose} stands behind each number without ±. How much another seed would change it is"
            " unknown, so a small difference between two models proves nothing."
        )
    if _get(report, "settings", "train"):
        rates = _get(report, "settings", "rates") or []
        same = "seeds" if rates else "learning rate and seeds"
        lines.append(
            f"All models were trained on the same data with the same number of images, {same}. This"
            " shows which model does best within this budget; a longer schedule may change the"
            " order."
        )
        if rates:
            lines.append("Each model stands in the table with its best learning rate by mask AP.")
    given = [m["name"] for m in models if m.get("weights")]
    if given:
        lines.append(f"Weights of {', '.join(given)} were given; their training is not checked.")
    images = _get(report, "data", "images")
    if images is not None and images < 1000:
        lines.append(
            f"The test set has only {images:,} images, so part of every difference is due to the"
            " choice of these images."
        )
    if any(m.get("latency") for m in models):
        device = _get(report, "environment", "GPU") or _get(report, "environment", "CPU")
        lines.append(
            f"Times are medians on this machine ({device or 'unknown'}), in PyTorch without a"
            " compiler. The models took turns, so a slower minute affects all of them."
        )
    if any(d["group"] == "forbidden" for d in report.get("differences") or []):
        lines.append(
            "The configs differ in settings that a fair comparison holds equal (listed under"
            " differences): accuracy differences may come from those."
        )
    return lines


def per_class_csv(report: Report) -> str:
    """One line per model, task and class with AP, AP50 and AR100 in percent."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["model", "task", "class", "AP", "AP50", "AR100"])
    for model in report["models"]:
        for task, classes in (model.get("per_class") or {}).items():
            for name, found in classes.items():
                values = (_statistic(_get(found, k)).value for k in ("AP", "AP50", "AR100"))
                row = ["" if v is None else f"{v:.3f}" for v in values]
                writer.writerow([model["name"], TASKS[task], name, *row])
    return text.getvalue()


def _tasks(models: Sequence[Model]) -> list[str]:
    return [t for t in TASKS if any(_get(m, "metrics", t) for m in models)]


def _table(models: Sequence[Model], columns: Sequence[Column]) -> dict[str, Any]:
    best = [c.best(models) for c in columns]
    rows = []
    for i, model in enumerate(models):
        cells = []
        for column, top in zip(columns, best):
            cell = column.read(model)
            spread = None if cell.spread is None else number(cell.spread, column.digits)
            shown = {"text": column.text(cell.value), "spread": spread, "best": i in top}
            cells.append(
                shown | {"value": "" if cell.value is None else cell.value, "tip": cell.tip}
            )
        rows.append({"model": i, "cells": cells})
    return {"columns": columns, "rows": rows}


def _rate_table(models: Sequence[Model]) -> dict[str, Any]:
    """Mask AP of each model at each learning rate."""
    found = {
        m["name"]: {x["rate"]: _statistic(x["AP"]) for x in m.get("rates") or []} for m in models
    }
    rates = sorted({rate for x in found.values() for rate in x})
    return {
        "rates": rates,
        "rows": [
            (name, [number(x.get(r, Cell(None)).value, 1) for r in rates])
            for name, x in found.items()
        ],
    }


def _per_class(report: Report, task: str) -> list[dict[str, Any]]:
    """Classes x models: AP, and the share of 100 that colors the cell."""
    found = [_get(m, "per_class", task) or {} for m in report["models"]]
    names = dict.fromkeys(
        [*(_get(report, "data", "classes") or []), *(c for f in found for c in f)]
    )
    rows = []
    for name in names:
        cells = [_statistic(_get(f, name, "AP")) for f in found]
        if any(c.value is not None for c in cells):
            texts = [number(c.value, 1) for c in cells]
            rows.append({"name": name, "cells": list(zip(texts, [c.value for c in cells]))})
    return rows


def _best_f1(models: Sequence[Model], task: str) -> list[tuple[str, str, str, str]]:
    """(model, class, F1, score threshold) at IoU 0.5."""
    return [
        (m["name"], name, number(100 * x["f1"], 1), number(x["score"], 2))
        for m in models
        for name, x in (_get(m, "best_f1", task) or {}).items()
    ]


def _confusion(report: Report, model: Model) -> dict[str, Any]:
    names = [*(_get(report, "data", "classes") or []), "background"]
    rows = []
    for name, counts in zip(names, model["confusion"]):
        total = max(1, sum(counts))
        rows.append({"name": name, "cells": [(n, n / total) for n in counts]})
    return {"name": model["name"], "classes": names, "rows": rows}


def _gallery(report: Report) -> list[dict[str, Any]]:
    """Pictures of the ground truth and of each model's detections, as many as fit into the page."""
    figures, size = [], 0
    for entry in report.get("gallery") or []:
        panels = [
            {"name": n, "model": m, "note": t, "image": i} for n, m, t, i in _panels(report, entry)
        ]
        size += sum(len(p["image"]) for p in panels)
        if figures and size > _GALLERY_BUDGET:
            break
        disagreement = entry.get("disagreement")
        note = "" if disagreement is None else f"disagreement {disagreement:.2f}"
        figures.append({"name": Path(entry["file_name"]).name, "note": note, "panels": panels})
    return figures


def _panels(report: Report, entry: Mapping[str, Any]) -> list[tuple[str, int | None, str, str]]:
    """(name, model, note, data URL); the same object has the same color in every panel."""
    truth = entry["ground_truth"]
    size = truth[0]["rle"]["size"] if truth else (240, 320)
    try:
        image = read_image(entry["file_name"])
    except (OSError, ValueError):  # gone since
        image = np.full((*size, 3), 128, np.uint8)
    colors = [_CROWD if x["iscrowd"] else instance_color(i) for i, x in enumerate(truth)]
    labels = [x["class"] + " (crowd)" * x["iscrowd"] for x in truth]
    panels = [("ground truth", None, _plural(len(truth)), _picture(image, truth, colors, labels))]
    for index, model in enumerate(report["models"]):
        found = (entry.get("predictions") or {}).get(model["name"])
        if found is None:
            continue
        matches = match(overlaps(found, truth), [x["iscrowd"] for x in truth])
        colors_found = [_UNMATCHED if m is None else colors[m] for m in matches]
        labels = [f"{x['class']} {x['score']:.0%}" for x in found]
        iou = (entry.get("ious") or {}).get(model["name"])
        note = "" if iou is None else f"mean IoU {iou:.2f}"
        panels.append((model["name"], index, note, _picture(image, found, colors_found, labels)))
    return panels


def _picture(
    image: np.ndarray,
    objects: Sequence[Mapping[str, Any]],
    colors: Sequence[tuple[int, int, int]],
    labels: Sequence[str],
) -> str:
    drawn = draw_masks(image, [x["rle"] for x in objects], colors, labels)
    scale = _PANEL_SIDE / max(drawn.shape[:2])
    if scale < 1:
        side = (max(1, round(drawn.shape[1] * scale)), max(1, round(drawn.shape[0] * scale)))
        drawn = cv2.resize(drawn, side, interpolation=cv2.INTER_AREA)
    _, data = cv2.imencode(".webp", drawn[:, :, ::-1], [cv2.IMWRITE_WEBP_QUALITY, 80])
    return "data:image/webp;base64," + base64.b64encode(data.tobytes()).decode()


def _write_figures(
    charts: Mapping[str, Any], gallery: Sequence[Mapping[str, Any]], folder: Path
) -> list[tuple[str, str]]:
    """(caption, path from the report) of the pictures for report.md."""
    folder.mkdir(exist_ok=True)
    figures = []
    for name, caption in _FIGURES.items():
        if name in charts:
            description = charts[name].properties(background="white").to_dict()
            picture = vl_convert.vegalite_to_png(_with_width(description), scale=2)
            with atomic_write(folder / f"{name}.png") as file:
                file.write(picture)
            figures.append((caption, f"figures/{name}.png"))
    for i, figure in enumerate(gallery[:4], start=1):
        for panel in figure["panels"]:
            name = re.sub(r"\W+", "_", f"gallery_{i}_{panel['name']}") + ".webp"
            with atomic_write(folder / name) as file:
                file.write(base64.b64decode(panel["image"].partition(",")[2]))
            figures.append((f"{figure['name']}: {panel['name']}", f"figures/{name}"))
    return figures


def _with_width(description: dict[str, Any]) -> dict[str, Any]:
    """A picture has no container to be as wide as."""
    return {**description, "width": 560}


def _write(path: Path, text: str) -> None:
    with atomic_write(path) as file:
        file.write(text.encode("utf-8", "replace"))


def _markdown(value: object) -> str:
    """Text that Markdown and the HTML in it show as it is, on one line."""
    text = " ".join(str(value).split()).replace("&", "&amp;").replace("<", "&lt;")
    # An underscore inside a word is no emphasis.
    return re.sub(r"[\\`*\[\]|~#]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", text)


def _counted(count: int, word: str) -> str:
    return f"{count:,} {word}{'s' * (count != 1)}"


def _plural(count: int) -> str:
    return _counted(count, "object")


def _with_values(columns: list[Column], models: Sequence[Model]) -> list[Column]:
    return [c for c in columns if any(c.read(m).value is not None for m in models)]


def _statistic(stat: Any) -> Cell:
    """A cell of ``{"mean", "std", "values"}`` or of None."""
    values = _get(stat, "values") or []
    tip = f"{len(values)} runs: {', '.join(number(v, 2) for v in values)}" if values[1:] else ""
    return Cell(_get(stat, "mean"), _get(stat, "std"), tip)


def _metric(task: str, key: str) -> Column:
    def read(model: Model) -> Cell:
        return _statistic(_get(model, "metrics", task, key))

    return Column(f"{TASKS[task]} {key}", f"{TASKS[task]} {METRICS[key]}", read, "max", 1)


def _plain(title: str, note: str, factor: float, key: str) -> Column:
    def read(model: Model) -> Cell:
        value = model.get(key)
        return Cell(None if value is None else value * factor)

    return Column(title, note, read, "min")


def _latency(batch: int) -> Column:
    def read(model: Model) -> Cell:
        timed = [t for t in model.get("latency") or [] if t["batch"] == batch]
        return _milliseconds(timed[0]["total"] if timed else None)

    return Column(f"ms, batch {batch}", "inference per image, median", read, "min")


def _memory(when: str, note: str) -> Column:
    def read(model: Model) -> Cell:
        memory = model.get("memory") or {}
        value, batch = memory.get(when), memory.get(f"{when}_batch")
        if value is None:
            return Cell(None)
        return Cell((value - (memory.get("baseline") or 0)) / 1e6, tip=f"batch {batch}")

    return Column(f"{when}, MB", note, read, "min", 0)


def _step(key: str, title: str, note: str) -> Column:
    def read(model: Model) -> Cell:
        return _milliseconds(_get(model, "training", key))

    return Column(title, note, read, "min")


def _total(model: Model) -> Cell:
    seconds = _get(model, "training", "seconds_per_iteration", "median")
    iterations = _get(model, "training", "iterations")
    if seconds is None or iterations is None:
        return Cell(None)
    return Cell(seconds * iterations / 60, tip=f"{iterations:,} iterations")


def _milliseconds(stat: Any) -> Cell:
    if _get(stat, "median") is None:
        return Cell(None)
    q1, q3 = (number(1e3 * stat[k]) for k in ("q1", "q3"))
    return Cell(1e3 * stat["median"], tip=f"quartiles {q1} to {q3} ms")
