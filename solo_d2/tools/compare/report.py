"""report.html, report.md, the CSV file and the figures of a comparison: see ``write_report``."""

import csv
import io
import json
import re
from base64 import b64encode
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
import vl_convert
from markupsafe import Markup

from solo_d2.evaluation import oracle
from solo_d2.files import atomic_write

from . import tables
from .accuracy import MAIN_METRICS, TASKS
from .charts import color_of, make_charts
from .fairness import GROUPS
from .gallery import make_gallery
from .tables import Table, number

Report = Mapping[str, Any]

_CHARTS = {
    "accuracy": "Accuracy over cost",
    "time": "Mean time per image",
    "losses": "Training losses",
    "validation": "Validation",
    "precision": "Precision over recall",
    "errors": "What errors cost",
}
_PAGES = ("report.html", "report.md")
_FIGURES = ("accuracy", "time", "losses", "errors")  # of report.md


def write_report(report: Report, folder: Path) -> None:
    """Write report.html, report.md, per_class.csv and figures/ of what is measured so far.

    Args:
        report: the content of report.json; whatever is not measured yet is None, empty or absent.
        folder: exists. Each file is replaced in one step, so that it is whole at any time.
    """
    charts, gallery = make_charts(report), make_gallery(report)
    script = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;") if charts else ""
    figures = _figures(charts, gallery)
    context = _context(report) | {
        "charts": {name: chart.to_dict() for name, chart in charts.items()},
        "chart_titles": _CHARTS,
        "gallery": gallery,
        "javascript": script,
        "figures": {path: caption for path, (caption, _) in figures.items()},
    }
    files = {path: picture for path, (_, picture) in figures.items()}
    texts = {x: _TEMPLATES.get_template(f"{x}.j2").render(context) for x in _PAGES}
    for name, text in {**texts, "per_class.csv": per_class_csv(report)}.items():
        files[name] = text.encode("utf-8", "replace")
    (folder / "figures").mkdir(exist_ok=True)
    for name, content in files.items():
        with atomic_write(folder / name) as file:
            file.write(content)


def terminal_table(report: Report) -> str:
    """The main columns for a terminal."""
    models = report["models"]
    return Table(models, tables.summary_cells, every=True).as_text(_with_status(models), "simple")


def winner_sentence(models: Sequence[Mapping[str, Any]]) -> str:
    """Who is best by the main metric and by how much, in one sentence."""
    for metric, (task, key) in MAIN_METRICS.items():
        scores = ((tables.score_cell(m, task, key).value, m["name"]) for m in models)
        known = sorted(((x, name) for x, name in scores if x is not None), reverse=True)
        if len(known) < 2:
            continue
        (best, name), (second, other) = known[:2]
        if number(best, 1) == number(second, 1):
            return f"{name} and {other} have the same {metric}, {number(best, 1)}."
        lead = number(best - second, 1)
        return f"{name} has the highest {metric}, {number(best, 1)}: {lead} more than {other}."
    return ""


def data_sentence(report: Report) -> str:
    """What was trained and evaluated on what, and how far that is."""
    data, statuses = report["data"], [m["status"] for m in report["models"]]
    text = f"{_counted(len(statuses), 'model')} evaluated on {', '.join(data['test'])}"
    text += f" ({_counted(data['images'], 'image')}, {_counted(data['instances'], 'object')})"
    if report["settings"]["train"]:
        text += f", trained on {', '.join(data['train'])}"
        text += f" ({_counted(data['images_train'], 'image')})" if data["images_train"] else ""
    failed, done = statuses.count("failed"), statuses.count("finished")
    text += ". " + (
        "Finished" if report["finished"] else f"Not finished: {done} of {len(statuses)}"
    )
    return text + (f", {failed} failed." if failed else ".")


def caveats(report: Report) -> list[str]:
    """What the numbers can and cannot tell, for this very comparison."""
    models, settings, images = report["models"], report["settings"], report["data"]["images"]
    most = max((len(m["seeds"]) for m in models), default=0)
    given = ", ".join(m["name"] for m in models if m["weights"])
    conditions = {
        f"± is the sample standard deviation over {most} trainings with different seeds. It is a "
        "rough one: read differences of about its size as undecided.": most > 1,
        "One training stands behind each number without ±. How much another seed would change it "
        "is unknown, so a small difference proves nothing.": most < 2,
        "All models were trained with the same number of images. A longer schedule may change the "
        "order.": settings["train"],
        "Each model stands in the tables with its best learning rate.": settings["rates"],
        f"The weights of {given} were given; their training is not checked.": given,
        f"Part of every difference is the choice of only {images} test images.": images < 1000,
        "Times are medians on this machine, in PyTorch. The models took turns.": any(
            m["latency"] for m in models
        ),
    }
    return [line for line, holds in conditions.items() if holds]


def per_class_csv(report: Report) -> str:
    """One line per model, task and class, see ``accuracy.class_metrics``."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    metrics = ("AP", "AP50", "AR100", "F1", "threshold")
    writer.writerow(["model", "task", "class", *metrics])
    for model in report["models"]:
        for task, classes in model.get("per_class", {}).items():
            for name, found in classes.items():
                values = [found[k]["mean"] for k in metrics]
                row = ["" if v is None else f"{v:.3f}" for v in values]
                writer.writerow([model["name"], TASKS[task], name, *row])
    return text.getvalue()


def _context(report: Report) -> dict[str, Any]:
    models, classes = report["models"], report["data"]["classes"]
    tasks = list(dict.fromkeys(task for m in models for task in m["metrics"]))
    scores = {t: Table(models, partial(tables.all_scores, task=t)) for t in tasks}
    grids = {
        key: {TASKS[t]: tables.class_grid(models, classes, t, key) for t in TASKS if t in tasks}
        for key in ("AP", "F1")
    }
    differences = {g: [d for d in report["differences"] if d["group"] == g] for g in GROUPS}
    errors = {k: Table(models, partial(tables.error_cells, metric=k)) for k in oracle.METRICS}
    shown = {  # also in report.md
        "Results": Table(models, tables.summary_cells, every=True),
        **{f"Results of {task}": table for task, table in scores.items() if task not in TASKS},
        "At each learning rate": Table(models, tables.rate_cells),
    }
    return {
        "title": f"Comparison on {', '.join(report['data']['test'])}",
        "report": report,
        "models": models,
        "names": [m["name"] for m in models],
        "md_names": [_markdown(name) for name in _with_status(models)],
        "md_tables": shown | {"Points of mask AP that errors cost": errors["AP"]},
        "colors": [color_of(i) for i in range(len(models))],
        "winner": winner_sentence(models),
        "data_sentence": data_sentence(report),
        "caveats": caveats(report),
        "summary": shown.pop("Results"),
        "shown": shown,
        "metrics": {TASKS[t]: table for t, table in scores.items() if t in TASKS},
        "errors": errors,
        "error_kinds": oracle.KINDS,
        "per_class": grids["AP"],
        "best_f1": grids["F1"],
        "confusion": {
            m["name"]: tables.confusion_grid(m, classes) for m in models if m.get("confusion")
        },
        "differences": {GROUPS[g]: found for g, found in differences.items() if found},
        "forbidden": differences["forbidden"],
        "facts": report["environment"] | report["settings"],
    }


def _with_status(models: Sequence[Mapping[str, Any]]) -> list[str]:
    return [f"{m['name']} ({m['status']})".removesuffix(" (finished)") for m in models]


def _setting(value: object) -> str:
    """A value of a config."""
    if value is None or value == "":
        return "-"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _markdown(value: object) -> str:
    """Text that Markdown and the HTML in it show as it is, on one line."""
    text = " ".join(str(value).split()).replace("&", "&amp;").replace("<", "&lt;")
    # An underscore inside a word is no emphasis.
    return re.sub(r"[\\`*\[\]|~#]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", text)


def _figures(
    charts: Mapping[str, Any], gallery: Sequence[Mapping[str, Any]]
) -> dict[str, tuple[str, bytes]]:
    """Path from the report -> caption and content of the pictures for report.md."""
    figures = {}
    for name in _FIGURES:
        if name in charts:  # a picture has no container to be as wide as
            description = charts[name].properties(background="white").to_dict() | {"width": 560}
            picture = vl_convert.vegalite_to_png(description, scale=2)
            figures[f"figures/{name}.png"] = _CHARTS[name], picture
    for i, figure in enumerate(gallery[:4], start=1):
        for panel in figure["panels"]:
            name = re.sub(r"\W+", "_", f"gallery_{i}_{panel['name']}")
            caption = f"{figure['name']}: {panel['name']}"
            figures[f"figures/{name}.webp"] = caption, panel["image"]
    return figures


def _counted(count: int, word: str) -> str:
    return f"{count:,} {word}{'s' * (count != 1)}"


_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).with_name("templates")),
    autoescape=jinja2.select_autoescape(["html.j2"]),
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_TEMPLATES.filters |= {
    "md": _markdown,
    "setting": _setting,
    "number": number,
    "script_json": lambda x: Markup(json.dumps(x).replace("<", "\\u003c")),
    "webp_url": lambda x: "data:image/webp;base64," + b64encode(x).decode(),
}
