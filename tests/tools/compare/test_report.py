"""The report as a whole: its files, its Markdown, and comparisons that are half done."""

import json
import re

import pytest
from PIL import Image

from solo_d2.tools.compare.report import markdown, write_report
from solo_d2.tools.compare.summary import caveats, number, summary_columns

NASTY = '<b>&"|`*_x_* \x00\ud800 $a$ 中文'


def parts_of(model):
    return [k for k in model if k not in ("name", "config", "architecture", "status")]


def empty(value):
    """As report.json has what is not measured yet."""
    return [] if isinstance(value, list) else {} if isinstance(value, dict) else None


def table(text, heading="## Results"):
    """Rows of the first table after a heading, as lists of cells."""
    lines = text[text.index(heading) :].splitlines()[2:]
    rows = []
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append([c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]])
    return [rows[0], *rows[2:]]


def test_writes_the_page_the_text_and_every_figure_that_the_text_shows(example_report, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    write_report(example_report, folder)
    text = (folder / "report.md").read_text(encoding="utf-8")
    shown = re.findall(r"!\[.*\]\((.*)\)", text)
    assert {"figures/mask_ap_latency_batch_1.png", "figures/gallery_1.jpg"} <= set(shown)
    assert {str(p.relative_to(folder)) for p in folder.glob("figures/*")} == set(shown)
    for path in shown:
        with Image.open(folder / path) as picture:
            low, high = picture.convert("L").getextrema()
            assert high - low > 100, f"{path} is blank"
    assert (folder / "report.html").read_text(encoding="utf-8").endswith("</html>\n")
    assert not list(folder.rglob("*.partial"))


def test_table_has_mean_and_spread_and_marks_the_best(example_report):
    header, alpha, beta = table(markdown(example_report))
    row = dict(zip(header, alpha))
    assert row["mask AP"] == "**41.0** ± 1.4"
    assert row["time per image, ms batch 1"] == "**30.0**"
    assert row["GFLOPs"] == "1.50", "equal for all: nothing is best"
    assert row["memory, MB inference"] == "120", "above the baseline"
    assert row["training total, min"] == number(400 * 0.25 / 60)
    assert dict(zip(header, beta))["mask AP"] == "38.0 ± 1.4"


def test_columns_without_any_value_are_left_out_and_single_ones_are_dashes(example_report):
    example_report["models"][1]["latency"] = []
    for model in example_report["models"]:
        model["memory"] = None
    header, alpha, beta = table(markdown(example_report))
    assert not [h for h in header if "memory" in h]
    assert dict(zip(header, beta))["time per image, ms batch 8"] == "-"


@pytest.mark.parametrize("count", [0, 1, 2])
@pytest.mark.parametrize("gallery", [True, False])
def test_only_part_of_the_models_is_done(example_report, tmp_path, count, gallery):
    for model in example_report["models"][count:]:
        model["status"] = "waiting"
        for key in parts_of(model):
            model[key] = empty(model[key])
        for entry in example_report["gallery"]:
            entry["predictions"].pop(model["name"])
    if not gallery or not count:
        example_report["gallery"] = []
    example_report["finished"] = False
    write_report(example_report, tmp_path)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert f"Not finished: {count} of 2 models" in text


def test_any_part_of_a_model_may_be_missing(example_report):
    model = example_report["models"][0]
    for key in parts_of(model):
        value, model[key] = model[key], None
        markdown(example_report)
        model[key] = empty(value)
        markdown(example_report)
        del model[key]
        markdown(example_report)
        model[key] = value


@pytest.mark.parametrize("key", ["environment", "settings", "data", "differences", "gallery"])
def test_any_part_of_the_report_may_be_missing(example_report, tmp_path, key):
    del example_report[key]
    write_report(example_report, tmp_path)


def test_a_failed_model_is_named_with_its_error(example_report, tmp_path):
    example_report["models"][1].update(status="failed", error="out of <memory>")
    write_report(example_report, tmp_path)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "**beta failed:** out of &lt;memory>" in text
    assert "1 failed" in text and "beta (failed)" in text


def test_names_cannot_break_the_text(example_report, tmp_path):
    text = json.dumps(example_report).replace('"alpha"', json.dumps(NASTY))
    report = json.loads(text.replace('"disc"', json.dumps(NASTY)))
    write_report(report, tmp_path)
    written = (tmp_path / "report.md").read_text(encoding="utf-8")
    rows = table(written)
    assert len({len(row) for row in rows}) == 1, "a | in the name is no new cell"
    assert "<b>" not in written and rows[1][0].startswith("&lt;b>&amp;")


def test_one_run_is_called_one_run(example_report):
    assert not any("One training" in line for line in caveats(example_report))
    for model in example_report["models"]:
        model["seeds"] = [1]
        for metrics in model["metrics"].values():
            for stat in metrics.values():
                stat.update(std=None, values=stat["values"][:1])
    assert any("One training" in line for line in caveats(example_report))
    assert "±" not in "".join(map("".join, table(markdown(example_report))))


def test_differences_that_are_not_allowed_are_said(example_report):
    assert "not allowed" not in markdown(example_report)
    values = {"alpha": 0.1, "beta": 0.2}
    example_report["differences"].append(
        {"key": "SOLVER.BASE_LR", "values": values, "group": "forbidden", "reason": ""}
    )
    rows = table(markdown(example_report), "## Differences")
    assert rows[1] == ["SOLVER.BASE_LR", "0.1", "0.2", "**not allowed in a fair comparison**"]
    assert rows[2][:3] == ["MODEL.FPN.OUT_CHANNELS", "64", "-"]
    assert any("differ in settings" in line for line in caveats(example_report))


def test_numbers_have_three_significant_digits():
    values = [None, float("nan"), 0, 0.012345, 1.2345, 12.345, 123.45, 1234.5]
    assert [number(v) for v in values] == [
        "-",
        "-",
        "0.00",
        "0.0123",
        "1.23",
        "12.3",
        "123",
        "1,234",
    ]
    assert number(12.345, 1) == "12.3"


def test_best_is_judged_by_the_digits_shown(example_report):
    column = next(c for c in summary_columns(example_report) if c.title == "AP")
    models = example_report["models"]
    for model, ap in zip(models, (40.01, 40.04)):
        model["metrics"]["segm"]["AP"]["mean"] = ap
    assert column.best(models) == set()
    assert column.best([*models, {"metrics": {"segm": {"AP": {"mean": 39.0}}}}]) == {0, 1}
