"""The findings of ``check``, as text and as json."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from detectron2.config import CfgNode
from tabulate import tabulate
from torch import Tensor

from solo_d2.data.coco import REFUSED, REPAIRED, SKIPPED

from .occupancy import Cells

# In addition to the reader's effects: something odd that training uses unchanged.
REMARK = "remark"
_EFFECTS = [REFUSED, SKIPPED, REPAIRED, REMARK]

# Mask areas in pixels from which an object is medium or large in COCO's metrics.
_MEDIUM, _LARGE = 32**2, 96**2
_QUANTILES = {"min": 0.0, "5 %": 0.05, "25 %": 0.25, "median": 0.5, "75 %": 0.75, "95 %": 0.95}
_QUANTILES["max"] = 1.0
_EXAMPLES = 3


@dataclass
class Report:
    """The findings about one data set; "objects" excludes crowds."""

    name: str
    keys: list[str]
    json_file: str
    image_root: str
    options: dict[str, bool] = field(default_factory=dict)  # of ``read_coco``
    expected_classes: list[str] | None = None  # None: any
    findings: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    images: int = 0
    objects: int = 0
    crowds: int = 0
    most_objects: int = 0  # in one image
    classes: dict[str, tuple[int, int]] = field(default_factory=dict)  # objects, images
    sizes: dict[str, dict[str, float]] = field(default_factory=dict)
    cells: Cells | None = None

    @property
    def is_training(self) -> bool:
        return "DATASETS.TRAIN" in self.keys

    def add(self, effect: str, what: str, offender: str) -> None:
        """Add an entry to the findings of its kind."""
        self.findings.setdefault((effect, what), []).append(offender)

    def to_json(self) -> dict[str, Any]:
        """Everything, for ``json.dumps``."""
        findings = [
            {"effect": effect, "what": what, "offenders": who}
            for (effect, what), who in self.findings.items()
        ]
        cells = self.cells and {k: v for k, v in vars(self.cells).items() if k in _COUNTS}
        return vars(self) | {"findings": findings, "cells": cells}


# Attributes of ``Cells``, and what happens to the objects that have no cell.
_REASONS = {
    "lost": "lose all of theirs to objects that come later in the json: raise MODEL.SOLO.NUM_GRIDS",
    "too_small": "are too small for MODEL.SOLO.SCALE_RANGES: lower the first bound",
    "out_of_range": "are too large for MODEL.SOLO.SCALE_RANGES, or between two: raise a bound",
    "empty": "have no pixel of their mask left: raise INPUT.MIN_SIZE_TEST",
}
_COUNTS = {"levels", "objects", *_REASONS}


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
        f"{report.crowds} crowds",
        "No problems.",
    ]
    if report.findings:
        findings = sorted(report.findings.items(), key=lambda x: _EFFECTS.index(x[0][0]))
        rows = [(effect, len(who), what, _examples(who)) for (effect, what), who in findings]
        headers = ["training", "count", "finding", "offenders"]
        parts[1] = tabulate(rows, headers, maxcolwidths=[None, None, 44, 60])
    if report.objects:
        low, high = cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST
        size = f"shorter side {low}, longer at most {high}" if low else "that of the image"
        sizes = [{"sqrt(area)": name} | row for name, row in report.sizes.items()]
        parts += [
            _class_table(report.classes),
            f"{tabulate(sizes, headers='keys')}\n"
            f"Test size: {size} (INPUT.MIN_SIZE_TEST, MAX_SIZE_TEST).",
        ]
    if report.cells and report.objects:
        parts.append(_cell_table(report.cells, cfg))
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


def _cell_table(cells: Cells, cfg: CfgNode) -> str:
    solo = cfg.MODEL.SOLO
    rows = [
        (feature, number, f"{low:g} to {high:g}", *level)
        for feature, number, (low, high), level in zip(
            solo.IN_FEATURES, solo.NUM_GRIDS, solo.SCALE_RANGES, cells.levels
        )
    ]
    headers = ["level", "NUM_GRIDS", "SCALE_RANGES", "objects", "without a cell there"]
    lines = [
        f"Grid cells of {cfg.MODEL.META_ARCHITECTURE} at test size, each image padded by itself",
        tabulate(rows, headers),
        f"{cells.without_cell} of {cells.objects} objects have no cell on any level"
        + (":" if cells.without_cell else "."),
    ]
    counts = {reason: getattr(cells, name) for name, reason in _REASONS.items()}
    return "\n".join(lines + [f"  {count} {reason}" for reason, count in counts.items() if count])


def summary(reports: Sequence[Report]) -> str:
    """One line about all data sets."""
    counts: Counter[str] = Counter()
    for effect, offenders in _findings(reports):
        counts[effect] += len(offenders)
    sets = "1 data set" if len(reports) == 1 else f"{len(reports)} data sets"
    text = f"{sets} checked: no problems"
    if counts:
        text = f"{sets} checked: " + ", ".join(f"{counts[e]} {e}" for e in _EFFECTS[:3])
        text += f", {counts[REMARK]} remarks"
    without = sum(report.cells.without_cell for report in reports if report.cells)
    return text + (f"; {without} objects without a grid cell" if without else "")


def has_problems(reports: Sequence[Report]) -> bool:
    """Whether training would refuse or skip anything."""
    return any(effect in (REFUSED, SKIPPED) for effect, _ in _findings(reports))


def _findings(reports: Sequence[Report]) -> Iterable[tuple[str, list[str]]]:
    for report in reports:
        yield from ((effect, who) for (effect, _), who in report.findings.items())
