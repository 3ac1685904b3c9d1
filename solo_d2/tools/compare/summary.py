"""What a comparison's report says in tables and words, whatever the format: see ``columns``."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

Report = Mapping[str, Any]
Model = Mapping[str, Any]

TASKS = {"segm": "mask", "bbox": "box"}
PARTS = {
    "preprocess": "pre-processing",
    "network": "network",
    "nms": "NMS and assembly",
    "output": "output to masks",
}
_METRICS = {
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
_IN_SUMMARY += [("bbox", "AP")]
MISSING = "-"


class Cell(NamedTuple):
    """A value of a table; ``spread`` is the standard deviation over seeds."""

    value: float | None
    spread: float | None = None
    tip: str = ""


@dataclass(frozen=True)
class Column:
    group: str
    title: str
    note: str
    read: Callable[[Model], Cell]
    better: str  # "max" or "min"
    digits: int | None = None  # None: three significant digits

    def text(self, value: float | None) -> str:
        return number(value, self.digits)

    def best(self, models: Sequence[Model]) -> set[int]:
        """Indices of the best models, as far as the digits shown tell; none when all are alike."""
        values = {i: self.read(m).value for i, m in enumerate(models)}
        known = {i: v for i, v in values.items() if v is not None}
        if not known:
            return set()
        top = self.text((max if self.better == "max" else min)(known.values()))
        best = {i for i, v in known.items() if self.text(v) == top}
        return best if len(best) < len(known) else set()


def get(mapping: Any, *keys: str) -> Any:
    """``mapping[key][key]...``, None where something is missing on the way."""
    for key in keys:
        mapping = mapping.get(key) if isinstance(mapping, Mapping) else None
    return mapping


def finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def number(value: float | None, digits: int | None = None) -> str:
    """With ``digits`` decimals, or with three significant digits and never an exponent."""
    if value is None or not finite(value):
        return MISSING
    if digits is None:
        magnitude = math.floor(math.log10(abs(value))) if value else 0
        digits = min(6, max(0, 2 - magnitude))
    return f"{value:,.{digits}f}"


def summary_columns(report: Report) -> list[Column]:
    """The columns of the main table; those for which no model has a value are left out."""
    cuda = any(get(m, "memory", "device") == "cuda" for m in report["models"])
    memory_note = (
        "peak of the tensors allocated on the GPU"
        if cuda
        else "peak resident memory of a fresh process, above what it had before the model was built"
    )
    columns = [_metric(task, key) for task, key in _IN_SUMMARY]
    columns += [
        _plain("size", "params, M", "millions of parameters", 1e-6, "parameters"),
        _plain("size", "GFLOPs", "one multiply-add counts as one", 1e-9, "flops"),
    ]
    columns += [_latency(batch) for batch in batches(report)]
    columns += [_memory("inference", memory_note), _memory("training", memory_note)]
    columns += [
        _step("step", "step, ms", "one training step, timed in turns with the other models")
        if any(get(m, "training", "step") for m in report["models"])
        else _step("seconds_per_iteration", "logged step, ms", "one iteration, median of the log"),
        Column("training", "total, min", "iterations times the logged time of one", _total, "min"),
    ]
    return _measured(columns, report["models"])


def metric_columns(report: Report, task: str) -> list[Column]:
    """All COCO metrics of a task that any model has."""
    return _measured([_metric(task, key) for key in _METRICS], report["models"])


def batches(report: Report) -> list[int]:
    """Batch sizes that any model was timed with."""
    return sorted({t["batch"] for m in report["models"] for t in m.get("latency") or []})


def latency(model: Model, batch: int) -> Mapping[str, Any] | None:
    return next((t for t in model.get("latency") or [] if t["batch"] == batch), None)


def tasks(report: Report, part: str = "metrics") -> list[str]:
    return [t for t in TASKS if any(get(m, part, t) for m in report["models"])]


def title(report: Report) -> str:
    return f"Comparison on {', '.join(get(report, 'data', 'test') or []) or 'no data'}"


def data_sentence(report: Report) -> str:
    """What was trained and evaluated on what, in one sentence or two."""
    data, models = report.get("data") or {}, report["models"]
    count = f"{len(models)} model{'s' * (len(models) != 1)}"
    text = f"{count} evaluated on {', '.join(data.get('test') or []) or 'no data'}"
    sizes = [(data.get("images"), "images"), (data.get("instances"), "objects")]
    sizes += [(len(data.get("classes") or []) or None, "classes")]
    known = [f"{n:,} {what if n != 1 else _singular(what)}" for n, what in sizes if n is not None]
    text += f" ({', '.join(known)})" if known else ""
    if get(report, "settings", "train"):
        text += f", trained on {', '.join(data.get('train') or []) or 'no data'}"
        if data.get("images_train") is not None:
            text += f" ({data['images_train']:,} images)"
    return text + "."


def state(report: Report) -> str:
    """Whether the comparison is complete; else how far it is."""
    models = report["models"]
    failed = sum(m.get("status") == "failed" for m in models)
    done = sum(m.get("status") == "finished" for m in models)
    text = "Finished" if report.get("finished") else f"Not finished: {done} of {len(models)} models"
    return text + (f", {failed} failed." if failed else ".")


def caveats(report: Report) -> list[str]:
    """What the numbers can and cannot tell, for this very comparison."""
    models = report["models"]
    runs = {len(m.get("seeds") or []) for m in models if m.get("metrics")} - {0}
    lines = []
    if runs and max(runs) > 1:
        lines.append(
            f"Accuracy is the mean ± the sample standard deviation over up to {max(runs)} trainings"
            " with different seeds. A standard deviation of so few runs is itself rough: read"
            " differences of about its size as undecided."
        )
    if 1 in runs or (not runs and any(m.get("metrics") for m in models)):
        whose = "One training" if 1 in runs else "One set of weights"
        lines.append(
            f"{whose} stands behind each number without ±. How much another seed would change it"
            " is not known, so a small difference between two models proves nothing."
        )
    if get(report, "settings", "train"):
        lines.append(
            "Same data, same number of images seen and same seeds for all. This tells which model"
            " does best within this budget; with a longer schedule, or with the schedule that each"
            " was tuned for, the order can be another."
        )
    given = [m["name"] for m in models if m.get("weights")]
    if given:
        lines.append(
            f"Weights were given for {', '.join(given)}: how they were trained is not checked here."
        )
    images = get(report, "data", "images")
    if images is not None and images < 1000:
        lines.append(
            f"The test set has only {images:,} images: some of every difference is the choice of"
            " these images."
        )
    if batches(report):
        device = get(report, "environment", "GPU") or get(report, "environment", "CPU")
        where = f" ({device})" if device else ""
        lines.append(
            f"Times are medians on this one machine{where}, in PyTorch without a compiler; the"
            " models took turns, so that a slower minute touches all of them. On other hardware or"
            " with an exported model the order can change."
        )
    uncounted = sorted({op for m in models for op in m.get("flops_unsupported") or {}})
    if uncounted:
        lines.append(f"FLOPs leave out what fvcore does not count: {', '.join(uncounted)}.")
    if any(d.get("group") == "forbidden" for d in report.get("differences") or []):
        lines.append(
            "The configs differ in settings that a fair comparison holds equal (listed under"
            " differences): accuracy differences may come from those."
        )
    return lines


def forbidden(report: Report) -> list[Mapping[str, Any]]:
    return [d for d in report.get("differences") or [] if d.get("group") == "forbidden"]


def _singular(word: str) -> str:
    return {"classes": "class"}.get(word, word[:-1])


def _measured(columns: list[Column], models: Sequence[Model]) -> list[Column]:
    return [c for c in columns if any(c.read(m).value is not None for m in models)]


def statistic(stat: Any) -> Cell:
    """A cell of ``{"mean", "std", "values"}`` or of None."""
    values = get(stat, "values") or []
    tip = f"{len(values)} runs: {', '.join(number(v, 2) for v in values)}" if values[1:] else ""
    mean, spread = get(stat, "mean"), get(stat, "std")
    return Cell(mean if finite(mean) else None, spread if finite(spread) else None, tip)


def _metric(task: str, key: str) -> Column:
    def read(model: Model) -> Cell:
        return statistic(get(model, "metrics", task, key))

    return Column(TASKS[task], key, f"{TASKS[task]} {_METRICS[key]}", read, "max", 1)


def _plain(group: str, heading: str, note: str, factor: float, key: str) -> Column:
    def read(model: Model) -> Cell:
        value = model.get(key)
        return Cell(None if value is None else value * factor)

    return Column(group, heading, note, read, "min")


def _latency(batch: int) -> Column:
    def read(model: Model) -> Cell:
        return _milliseconds(get(latency(model, batch), "total"))

    note = f"inference per image at batch {batch}, median"
    return Column("time per image, ms", f"batch {batch}", note, read, "min")


def _memory(when: str, note: str) -> Column:
    def read(model: Model) -> Cell:
        memory = model.get("memory") or {}
        value, batch = memory.get(when), memory.get(f"{when}_batch")
        if value is None:
            return Cell(None)
        megabytes = (value - (memory.get("baseline") or 0)) / 1e6
        return Cell(megabytes, tip=f"batch {batch}" if batch else "")

    return Column("memory, MB", when, note, read, "min", 0)


def _step(key: str, heading: str, note: str) -> Column:
    def read(model: Model) -> Cell:
        return _milliseconds(get(model, "training", key))

    return Column("training", heading, note, read, "min")


def _total(model: Model) -> Cell:
    seconds = get(model, "training", "seconds_per_iteration", "median")
    iterations = get(model, "training", "iterations")
    if seconds is None or iterations is None:
        return Cell(None)
    return Cell(seconds * iterations / 60, tip=f"{iterations:,} iterations")


def _milliseconds(stat: Any) -> Cell:
    median, q1, q3 = (get(stat, key) for key in ("median", "q1", "q3"))
    if median is None:
        return Cell(None)
    quartiles = q1 is not None and q3 is not None
    tip = f"quartiles {number(q1 * 1e3)} to {number(q3 * 1e3)} ms" if quartiles else ""
    return Cell(median * 1e3, tip=tip)
