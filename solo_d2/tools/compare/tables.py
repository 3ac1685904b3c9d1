"""The report's tables, made of the models' rows in report.json."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from tabulate import tabulate

from solo_d2.evaluation.oracle import KINDS

Model = Mapping[str, Any]
# Rows: name, and text and share (0 to 1, None if unknown) of each cell.
Grid = list[tuple[str, list[tuple[str, float | None]]]]

_IN_SUMMARY = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR100")


class Cell(NamedTuple):
    """A value of a table, and what is the same for its whole column."""

    value: float | None
    note: str = ""  # what the column has
    better: str = "min"  # or "max"
    digits: int | None = None  # None: three significant digits
    spread: float | None = None  # standard deviation over seeds
    tip: str = ""

    @property
    def text(self) -> str:
        return number(self.value, self.digits)


class Table:
    """Models x columns. Columns without any value are left out; models too, unless ``every``."""

    def __init__(
        self,
        models: Sequence[Model],
        read: Callable[[Model], Mapping[str, Cell]],
        *,
        every: bool = False,
    ):
        found = [{k: x for k, x in read(model).items() if x.value is not None} for model in models]
        self.columns: dict[str, Cell] = {}  # by title, for what is the same in a column
        for row in sorted(found, key=len, reverse=True):
            self.columns |= row
        self.rows = [  # (index of the model, a cell for each column)
            (i, [row.get(title, Cell(None)) for title in self.columns])
            for i, row in enumerate(found)
            if row or every
        ]
        self.best = [self._best(column) for column in range(len(self.columns))]

    def _best(self, column: int) -> set[int]:
        """Models that are best as far as the digits shown tell; none where all are alike."""
        known = [(i, cells[column]) for i, cells in self.rows if cells[column].value is not None]
        choose = max if known[0][1].better == "max" else min
        top = choose((x for _, x in known), key=lambda x: x.value or 0.0).text
        best = {i for i, x in known if x.text == top}
        return best if len(best) < len(known) else set()

    def as_text(self, names: Sequence[str], style: str) -> str:
        """For the terminal ("simple"), or for Markdown ("pipe") with the best values bold."""
        lines = []
        for index, cells in self.rows:
            line = [names[index]]
            for cell, best in zip(cells, self.best):
                bold = "**" if style == "pipe" and index in best else ""
                spread = "" if cell.spread is None else f" ± {number(cell.spread, cell.digits)}"
                line.append(f"{bold}{cell.text}{bold}{spread}")
            lines.append(line)
        heads = ["model", *self.columns]
        align = ["left"] + ["right"] * len(self.columns)
        return tabulate(lines, heads, style, colalign=align, disable_numparse=True)


def number(value: float | None, digits: int | None = None) -> str:
    """With ``digits`` decimals, or with three significant digits and never an exponent."""
    if value is None or not math.isfinite(value):
        return "-"
    if digits is None:
        magnitude = math.floor(math.log10(abs(value))) if value else 0
        digits = min(6, max(0, 2 - magnitude))
    return f"{value:,.{digits}f}"


def summary_cells(model: Model) -> dict[str, Cell]:
    """Accuracy and costs of a model, by title of the column; costs that are unknown are absent."""
    cells = {f"mask {k}": score_cell(model, "segm", k) for k in _IN_SUMMARY}
    cells["box AP"] = score_cell(model, "bbox", "AP")
    for key, title, scale, note in (
        ("parameters", "params, M", 1e-6, "millions of parameters"),
        ("flops", "GFLOPs", 1e-9, "multiply-adds of the network"),
        ("flops_post", "GFLOPs after", 1e-9, "multiply-adds after the network"),
        ("detections", "found", 1, "detections per image when operations were counted"),
    ):
        if model.get(key) is not None:
            cells[title] = Cell(model[key] * scale, note)
    for timed in model["latency"]:
        note = "inference per image, median"
        cells[f"ms, batch {timed['batch']}"] = _milliseconds(timed["total"], note)
    memory, training = model["memory"], model["training"]
    where = "tensors on the GPU" if memory.get("device") == "cuda" else "process, without libraries"
    for when in ("inference", "training"):
        if when in memory:
            value = (memory[when] - memory["baseline"]) / 1e6
            cells[f"{when}, MB"] = Cell(value, f"peak: {where}", digits=0)
    note = "one training step, timed in turns with the other models"
    cells["step, ms"] = _milliseconds(training["step"], note)
    logged, iterations = training["seconds_per_iteration"], training["iterations"]
    cells["iteration, ms"] = _milliseconds(logged, "median of the training's log")
    if logged and iterations:
        minutes = logged["median"] * iterations / 60
        note = "iterations times the logged time of one"
        cells["training, min"] = Cell(minutes, note, tip=f"{iterations:,} iterations")
    return cells


def score_cell(model: Model, task: str, key: str) -> Cell:
    return _statistic(model["metrics"].get(task, {}).get(key), "in percent", "max")


def rate_cells(model: Model) -> dict[str, Cell]:
    note = "by mask AP, box AP or mIoU"
    return {f"{x['rate']:g}": _statistic(x["score"], note, "max") for x in model.get("rates", ())}


def error_cells(model: Model, metric: str) -> dict[str, Cell]:
    return {
        kind: _statistic(stats[metric], KINDS.get(kind, metric), "min" if kind in KINDS else "max")
        for kind, stats in model.get("errors", {}).items()
    }


def class_grid(models: Sequence[Model], classes: Sequence[str], task: str, key: str) -> Grid:
    """Classes x models: AP, or F1 and its score threshold; without classes that have no value."""

    def cell(model: Model, name: str) -> tuple[str, float | None]:
        found = model.get("per_class", {}).get(task, {}).get(name, {})
        value, threshold = (found.get(k, {}).get("mean") for k in (key, "threshold"))
        text = number(value, 1) + (f" from {number(threshold, 2)}" if key == "F1" else "")
        return text, None if value is None else value / 100

    rows = [(name, [cell(model, name) for model in models]) for name in classes]
    return [row for row in rows if any(share is not None for _, share in row[1])]


def confusion_grid(model: Model, classes: Sequence[str]) -> Grid:
    rows = zip([*classes, "background"], model["confusion"])
    return [(name, [(f"{n}", n / max(1, sum(counts))) for n in counts]) for name, counts in rows]


def all_scores(model: Model, task: str) -> dict[str, Cell]:
    return {key: score_cell(model, task, key) for key in model["metrics"].get(task, ())}


def _statistic(stat: Mapping[str, Any] | None, note: str, better: str) -> Cell:
    """A cell of what ``accuracy.summarize`` gives."""
    if stat is None:
        return Cell(None)
    values = stat["values"]
    tip = f"{len(values)} runs: {', '.join(number(v, 2) for v in values)}" if values[1:] else ""
    return Cell(stat["mean"], note, better, 1, stat["std"], tip)


def _milliseconds(stat: Mapping[str, float] | None, note: str) -> Cell:
    if stat is None:
        return Cell(None)
    q1, q3 = (number(1e3 * stat[k]) for k in ("q1", "q3"))
    return Cell(1e3 * stat["median"], note, tip=f"quartiles {q1} to {q3} ms")
