"""report.md, report.html and the pictures of a comparison: see ``write_report``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from solo_d2.files import atomic_write
from solo_d2.tools.compare import plots, summary
from solo_d2.tools.compare.gallery import Entry
from solo_d2.tools.compare.html import page, setting
from solo_d2.tools.compare.raster import write_picture
from solo_d2.tools.compare.summary import Column, Model, Report

_SHEETS = 4  # images of the gallery in report.md


def write_report(report: dict[str, Any], folder: Path) -> None:
    """Write report.md, report.html and figures/ for what is measured so far.

    Args:
        report: the content of report.json; whatever is not measured yet is None, empty or absent.
        folder: exists. Each file is replaced in one step, so that it is whole at any time.
    """
    entries = [Entry(report, entry, i) for i, entry in enumerate(report.get("gallery") or [])]
    figures = _write_figures(report, entries, folder / "figures")
    _write(folder / "report.md", markdown(report, figures))
    _write(folder / "report.html", page(report, entries))


def markdown(report: Report, figures: Sequence[tuple[str, str]] = ()) -> str:
    """The report as GitHub's Markdown; ``figures``: (caption, path from the report)."""
    models = report["models"]
    lines = [f"# {_plain(summary.title(report))}", "", _plain(summary.data_sentence(report)), ""]
    lines += [_plain(summary.state(report)), ""]
    for model in models:
        if model.get("status") == "failed":
            error = _plain(model.get("error") or "no message")
            lines += [f"**{_plain(model['name'])} failed:** {error}", ""]
    columns = summary.summary_columns(report)
    if columns:
        lines += ["## Results", "", *_table(models, columns), ""]
        lines += ["Bold: best of its column. AP and AR in percent. " + _notes(columns), ""]
    lines += ["## What these numbers can and cannot tell", ""]
    lines += [f"- {_plain(line)}" for line in summary.caveats(report)] + [""]
    if figures:
        lines += ["## Figures", ""]
        for caption, path in figures:
            lines += [f"![{_plain(caption)}]({path})", "", f"*{_plain(caption)}*", ""]
    lines += _differences(report)
    lines += ["## How it was made", "", "```", (report.get("command") or "").strip(), "```", ""]
    facts = {**(report.get("environment") or {}), **(report.get("settings") or {})}
    lines += [f"- {_plain(k)}: {_plain(setting(v))}" for k, v in facts.items()]
    lines += ["", f"Written {_plain(report.get('created'))}. Interactive: report.html."]
    return "\n".join(lines) + "\n"


def _plain(value: object) -> str:
    """Text that Markdown and the HTML in it show as it is, on one line."""
    text = " ".join(str(value).split()).replace("&", "&amp;").replace("<", "&lt;")
    # An underscore inside a word is no emphasis.
    return re.sub(r"[\\`*\[\]|~#]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", text)


def _table(models: Sequence[Model], columns: Sequence[Column]) -> list[str]:
    names = [f"{c.group} {c.title}".removeprefix("size ") for c in columns]
    best = [c.best(models) for c in columns]
    rows = [f"| model | {' | '.join(map(_plain, names))} |", "|---|" + "---:|" * len(columns)]
    for i, model in enumerate(models):
        cells = []
        for column, top in zip(columns, best):
            cell = column.read(model)
            text = column.text(cell.value)
            text = f"**{text}**" if i in top else text
            spread = summary.number(cell.spread, column.digits)
            cells.append(text if cell.spread is None else f"{text} ± {spread}")
        status = model.get("status")
        name = _plain(model["name"]) + ("" if status == "finished" else f" ({status})")
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return rows


def _notes(columns: Sequence[Column]) -> str:
    """What the columns without a COCO name are, each note once."""
    notes: dict[str, list[str]] = {}
    for c in columns:
        if c.better == "min":
            notes.setdefault(c.note, []).append(f"{c.group} {c.title}".removeprefix("size "))
    return " ".join(f"{_plain(', '.join(names))}: {_plain(n)}." for n, names in notes.items())


def _differences(report: Report) -> list[str]:
    """Those under MODEL only by number, as there are many."""
    found = report.get("differences") or []
    listed = [d for d in found if d.get("group") not in ("model", "evaluation only")]
    lines = ["## Differences between the configs", ""]
    if listed:
        names = [m["name"] for m in report["models"]]
        lines += [f"| key | {' | '.join(map(_plain, names))} | why |"]
        lines += ["|---|" + "---|" * len(names) + "---|"]
        for d in sorted(listed, key=lambda d: d.get("group") != "forbidden"):
            values = d.get("values") or {}
            cells = [_plain(setting(values.get(name))) for name in names]
            bad = d.get("group") == "forbidden"
            why = "**not allowed in a fair comparison** " * bad + _plain(d.get("reason") or "")
            lines.append(f"| {_plain(d['key'])} | {' | '.join(cells)} | {why.strip()} |")
        lines.append("")
    rest = len(found) - len(listed)
    if rest or not found:
        lines += [
            f"{rest} more keys of the models differ: see report.html." if rest else "None.",
            "",
        ]
    return lines


def _write_figures(report: Report, entries: Sequence[Entry], folder: Path) -> list[tuple[str, str]]:
    """(caption, path from the report) of the pictures that this report has."""
    charts = [(choice, chart) for choice, chart in plots.accuracy_plots(report)[:2]]
    charts += [(f"Mean time per image, {c}", chart) for c, chart in plots.time_plots(report)]
    for kind, found in (
        ("Training", plots.loss_plots(report)),
        ("Validation", plots.validation_plots(report)),
    ):
        charts += [
            (f"{kind}: {choice}", plots.below(chart, plots.model_legend(report)))
            for choice, chart in found[:1]
        ]
    folder.mkdir(exist_ok=True)
    figures = []
    for caption, chart in charts:
        path = folder / (re.sub(r"\W+", "_", caption.lower()) + ".png")
        write_picture(chart, path)
        figures.append((caption[0].upper() + caption[1:], f"figures/{path.name}"))
    for i, entry in enumerate(entries[:_SHEETS]):
        path = folder / f"gallery_{i + 1}.jpg"
        write_picture(entry.sheet(), path, {entry.key: entry.image}, scale=1)
        figures.append((f"Gallery: {entry.file_name}", f"figures/{path.name}"))
    return figures


def _write(path: Path, text: str) -> None:
    with atomic_write(path) as file:
        file.write(text.encode("utf-8", "replace"))
