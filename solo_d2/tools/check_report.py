"""The findings of ``check``, as text and as json."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode
from tabulate import tabulate
from torch import Tensor

from solo_d2.data.coco import REFUSED, REPAIRED, SKIPPED
from solo_d2.modeling.solo.targets import level_offsets

from .occupancy import Advice, Grids, Occupancy

# In addition to the reader's effects: something odd that training uses unchanged.
REMARK = "remark"
_EFFECTS = [REFUSED, SKIPPED, REPAIRED, REMARK]

# Mask areas in pixels from which an object is medium or large in COCO's metrics.
_MEDIUM, _LARGE = 32**2, 96**2
_QUANTILES = {"min": 0.0, "5 %": 0.05, "25 %": 0.25, "median": 0.5, "75 %": 0.75, "95 %": 0.95}
_QUANTILES["max"] = 1.0
_EXAMPLES = 3


@dataclasses.dataclass
class Cells:
    """Assignment of the objects to grid cells at test size."""

    features: list[str]  # per level
    grids: Grids
    occupancy: Occupancy
    below: int  # objects that are smaller than every range
    above: int  # larger than every range
    scales: dict[str, float]  # quantiles of sqrt(box area)
    advice: list[Advice]


@dataclasses.dataclass
class Report:
    """The findings about one data set; "objects" excludes crowds."""

    name: str
    keys: list[str]
    json_file: str
    image_root: str
    findings: dict[tuple[str, str], list[str]] = dataclasses.field(default_factory=dict)
    images: int = 0
    objects: int = 0
    crowds: int = 0
    most_objects: int = 0  # in one image
    classes: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)  # objects, images
    sizes: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    cells: Cells | None = None

    @property
    def is_training(self) -> bool:
        return "DATASETS.TRAIN" in self.keys

    def add(self, effect: str, what: str, offender: str) -> None:
        """Add an entry to the findings of its kind."""
        self.findings.setdefault((effect, what), []).append(offender)


def size_row(areas: Tensor) -> dict[str, float]:
    """COCO's three size classes, and quantiles of the square root of the area."""
    small, large = int((areas < _MEDIUM).sum()), int((areas > _LARGE).sum())
    counts = {"small": small, "medium": len(areas) - small - large, "large": large}
    return counts | quantiles(areas.sqrt())


def quantiles(values: Tensor) -> dict[str, float]:
    if not len(values):
        return {}
    ordered = values.sort().values
    return {
        name: round(float(ordered[round(share * (len(ordered) - 1))]), 1)
        for name, share in _QUANTILES.items()
    }


def to_text(report: Report, cfg: CfgNode) -> str:
    """The section about one data set."""
    title = f"{report.name} ({', '.join(report.keys)})"
    parts = [
        f"{title}\n{'=' * len(title)}\n{report.json_file}\n{report.images} images in "
        f"{report.image_root}, {report.objects} objects (at most {report.most_objects} an image), "
        f"{report.crowds} crowds"
    ]
    findings = sorted(report.findings.items(), key=lambda x: _EFFECTS.index(x[0][0]))
    rows = [(effect, len(who), what, _examples(who)) for (effect, what), who in findings]
    if rows:
        headers = ["training", "count", "finding", "offenders"]
        parts.append(tabulate(rows, headers, maxcolwidths=[None, None, 44, 60]))
    else:
        parts.append("No problems.")
    if report.objects:
        parts.append(_class_table(report.classes))
        parts.append(_size_table(report, cfg))
        if report.cells:
            parts.append(_cell_tables(report.cells, cfg))
    return "\n\n".join(parts) + "\n"


def _examples(offenders: list[str]) -> str:
    more = len(offenders) - _EXAMPLES
    return ", ".join(offenders[:_EXAMPLES]) + (f", ... ({more} more)" if more > 0 else "")


def _class_table(classes: dict[str, tuple[int, int]]) -> str:
    """A table with the most frequent class first; many classes are in several columns."""
    ordered = sorted(classes.items(), key=lambda item: -item[1][0])
    blocks = min(3, -(-len(ordered) // 10))
    height = -(-len(ordered) // blocks)
    rows = [
        [cell for name, (objects, images) in ordered[i::height] for cell in (name, objects, images)]
        for i in range(height)
    ]
    return tabulate(rows, ["class", "objects", "images"] * blocks)


def _size_table(report: Report, cfg: CfgNode) -> str:
    rows = [{"sqrt(mask area)": name} | row for name, row in report.sizes.items()]
    if report.cells:
        row = {"sqrt(mask area)": "sqrt(box area) at test size"}
        rows.append(row | dict.fromkeys(("small", "medium", "large"), "") | report.cells.scales)
    text = tabulate(rows, headers="keys")
    return f"{text}\nTest size: {_test_size(cfg)}."


def _test_size(cfg: CfgNode) -> str:
    low, high = cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST
    if low == 0:
        return "that of the image (INPUT.MIN_SIZE_TEST is 0)"
    return f"shorter side {low}, longer at most {high} (INPUT.MIN_SIZE_TEST, MAX_SIZE_TEST)"


def _cell_tables(cells: Cells, cfg: CfgNode) -> str:
    counts, grids = cells.occupancy, cells.grids
    rows = [
        (feature, number, f"{low:g} to {high:g}", *level)
        for feature, number, (low, high), level in zip(
            cells.features, grids.num_grids, grids.scale_ranges, counts.levels
        )
    ]
    headers = ["level", "NUM_GRIDS", "SCALE_RANGES", "objects", "share a cell", "lose all cells"]
    between = counts.out_of_range - cells.below - cells.above
    lines = [
        f"Grid cells of {cfg.MODEL.META_ARCHITECTURE} at test size, each image padded by itself",
        tabulate(rows, headers),
        f"{counts.without_cell} of {counts.objects} objects have no cell on any level"
        + (":" if counts.without_cell else "."),
    ]
    reasons = {
        "lose all of theirs to objects that come later in the json": counts.lost,
        "are too small for SCALE_RANGES": cells.below,
        "are too large for SCALE_RANGES": cells.above,
        "are between two of SCALE_RANGES": between,
        "have no pixel of their mask left (INPUT.MIN_SIZE_TEST is too small)": counts.empty,
    }
    lines += [f"  {count} {reason}" for reason, count in reasons.items() if count]
    if cells.advice:
        total = level_offsets(grids.num_grids)[-1]
        options = [("as it is", counts.without_cell, total)]
        options += [
            (f'{a.key} "{a.value}"', a.occupancy.without_cell, a.cells) for a in cells.advice
        ]
        lines += ["", "Settings that would help, each by itself:"]
        lines.append(tabulate(options, ["setting", "objects without a cell", "cells in all"]))
    return "\n".join(lines)


def summary(reports: Sequence[Report]) -> str:
    """One line about all data sets."""
    counts: Counter[str] = Counter()
    for report in reports:
        for (effect, _), offenders in report.findings.items():
            counts[effect] += len(offenders)
    sets = "1 data set" if len(reports) == 1 else f"{len(reports)} data sets"
    text = f"{sets} checked: no problems"
    if counts:
        text = f"{sets} checked: " + ", ".join(f"{counts[e]} {e}" for e in _EFFECTS[:3])
        text += f", {counts[REMARK]} remarks"
    without = sum(report.cells.occupancy.without_cell for report in reports if report.cells)
    return text + (f"; {without} objects without a grid cell" if without else "")


def has_problems(reports: Sequence[Report]) -> bool:
    """Whether training would refuse or skip anything."""
    return any(effect in (REFUSED, SKIPPED) for report in reports for effect, _ in report.findings)


def to_json(value: Any) -> Any:
    """Dataclasses and named tuples as dicts, for json; findings as a list of dicts."""
    if isinstance(value, Report):
        findings = [
            {"effect": effect, "what": what, "offenders": who}
            for (effect, what), who in value.findings.items()
        ]
        return to_json(vars(value) | {"findings": findings})
    if dataclasses.is_dataclass(value):
        return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if hasattr(value, "_asdict"):
        return to_json(value._asdict())
    if isinstance(value, dict):
        return {key: to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    return value
