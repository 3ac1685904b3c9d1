"""The report as a whole: its files, its tables, its page, and comparisons that are half done."""

import json
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from solo_d2.evaluation import oracle
from solo_d2.tools.compare.report import caveats, terminal_table, write_report
from solo_d2.tools.compare.tables import Table, number, summary_cells

NASTY = '<script>alert(1)</script>&"|`*_x_* $a$ ``` 中文'


class Page(HTMLParser):
    """What a page loads, and its text outside of scripts and styles."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.sources, self.text, self._skip = [], [], "", False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self._skip = tag in ("script", "style")
        self.sources += [v for k, v in attributes if k in ("src", "href") and v]

    def handle_endtag(self, tag):
        self._skip = False

    def handle_data(self, data):
        self.text += "" if self._skip else data


def written(report, folder):
    """(report.md, report.html)"""
    write_report(report, folder)
    names = ("report.md", "report.html")
    return [(folder / name).read_text(encoding="utf-8") for name in names]


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
    text, page = written(example_report, folder)
    shown = re.findall(r"!\[.*\]\((.*)\)", text)
    assert {"figures/accuracy.png", "figures/time.png", "figures/losses.png"} <= set(shown)
    assert "figures/gallery_1_alpha.webp" in shown
    assert {str(p.relative_to(folder)) for p in folder.glob("figures/*")} == set(shown)
    for path in shown:
        with Image.open(folder / path) as picture:
            low, high = picture.convert("L").getextrema()
            assert high - low > 100 or path.endswith("webp"), f"{path} is blank"
    assert page.rstrip().endswith("</html>")
    lines = (folder / "per_class.csv").read_text().splitlines()
    assert lines[:2] == [
        "model,task,class,AP,AP50,AR100,F1,threshold",
        "alpha,mask,disc,41.000,51.000,46.000,80.000,0.450",
    ]
    assert not list(folder.rglob("*.partial"))


def test_the_page_loads_nothing_and_stays_small(example_report, tmp_path):
    _, text = written(example_report, tmp_path)
    page = Page(text)
    assert page.sources and all(x.startswith("data:image/") for x in page.sources)
    assert "default-src 'none'" in text
    assert len(text) < 2_000_000


def test_the_page_says_who_won_and_by_how_much(example_report, tmp_path):
    sentence = "alpha has the highest mask AP, 41.0: 3.0 more than beta."
    text, page = written(example_report, tmp_path)
    assert sentence in text and sentence in page
    example_report["models"][1]["metrics"] = example_report["models"][0]["metrics"]
    text, _ = written(example_report, tmp_path)
    assert "have the same mask AP, 41.0" in text


def test_table_has_mean_and_spread_and_marks_the_best(example_report, tmp_path):
    header, alpha, beta = table(written(example_report, tmp_path)[0])
    row = dict(zip(header, alpha))
    assert row["mask AP"] == "**41.0** ± 1.4"
    assert row["ms, batch 1"] == "**30.0**"
    assert row["GFLOPs"] == "1.50", "equal for all: nothing is best"
    assert row["inference, MB"] == "120", "above the baseline"
    assert row["training, min"] == number(400 * 0.25 / 60)
    assert dict(zip(header, beta))["mask AP"] == "38.0 ± 1.4"


def test_columns_without_any_value_are_left_out_and_single_ones_are_dashes(
    example_report, tmp_path
):
    example_report["models"][1]["latency"] = []
    for model in example_report["models"]:
        model["memory"] = {}
    header, alpha, beta = table(written(example_report, tmp_path)[0])
    assert not [h for h in header if "MB" in h]
    assert dict(zip(header, beta))["ms, batch 8"] == "-"


@pytest.mark.parametrize("count", [0, 1])
def test_what_is_not_measured_yet_is_left_out(example_report, tmp_path, count):
    for model in example_report["models"][count:]:
        model["status"] = "waiting"
        kept = ("name", "config", "architecture", "weights", "status", "error")
        known = {key: model[key] for key in kept}
        model.clear()
        model |= known | {"notes": [], "seeds": [], "metrics": {}, "latency": [], "memory": {}}
        model["training"] = {"iterations": 9, "seconds_per_iteration": None, "step": None}
        for entry in example_report["gallery"]:
            entry["predictions"].pop(model["name"])
    example_report["gallery"] = example_report["gallery"] if count else []
    example_report["finished"] = False
    text, page = written(example_report, tmp_path)
    assert f"Not finished: {count} of 2" in text
    assert ("Nothing has been measured yet" in page) == (count == 0)


def test_a_failed_model_is_named_with_its_error(example_report, tmp_path):
    example_report["models"][1].update(status="failed", error="out of <memory>")
    text, page = written(example_report, tmp_path)
    assert "**beta failed:** out of &lt;memory>" in text
    assert "1 failed" in text and "beta (failed)" in text
    assert "out of &lt;memory&gt;" in page


def test_no_name_becomes_markup(example_report, tmp_path):
    text = json.dumps(example_report)
    for name in ('"alpha"', '"disc"', '"configs/alpha.yaml"', '"MODEL.FPN.OUT_CHANNELS"'):
        text = text.replace(name, json.dumps(NASTY))
    text, page = written(json.loads(text), tmp_path)
    rows = table(text)
    assert len({len(row) for row in rows}) == 1, "a | in the name is no new cell"
    assert "<script>" not in text and rows[1][0].startswith("&lt;script>")
    plain = Page(written(example_report, tmp_path)[1])
    parsed = Page(page)
    assert parsed.tags == plain.tags, "no tag more than with harmless names"
    assert NASTY in parsed.text


def test_one_run_is_called_one_run(example_report, tmp_path):
    assert not any("One training" in line for line in caveats(example_report))
    for model in example_report["models"]:
        model["seeds"] = [1]
        for metrics in model["metrics"].values():
            for stat in metrics.values():
                stat.update(std=None, values=stat["values"][:1])
    assert any("One training" in line for line in caveats(example_report))
    assert "±" not in "".join(map("".join, table(written(example_report, tmp_path)[0])))


def test_differences_that_are_not_allowed_are_at_the_top(example_report, tmp_path):
    unfair = {"key": "SOLVER.MAX_ITER", "values": {"alpha": 1, "beta": 2}, "group": "forbidden"}
    example_report["differences"].append(unfair)
    text, page = written(example_report, tmp_path)
    assert "**Not a fair comparison:** SOLVER.MAX_ITER is 1 (alpha), 2 (beta)." in text
    assert page.index("Not a fair comparison") < page.index('id="results"')


def test_learning_rates_have_a_table(example_report, tmp_path):
    for model, values in zip(example_report["models"], [(30.0, 41.0), (38.0, None)]):
        stats = [{"mean": v, "std": None, "values": [v]} for v in values]
        model["rates"] = [{"rate": r, "score": s} for r, s in zip((0.001, 0.002), stats)]
    text, page = written(example_report, tmp_path)
    header, alpha, beta = table(text, "## At each learning rate")
    assert header == ["model", "0.001", "0.002"]
    assert (alpha, beta) == (["alpha", "30.0", "41.0"], ["beta", "**38.0**", "-"])


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0.00"), (1234.5, "1,234"), (12.345, "12.3"), (0.012345, "0.0123"), (None, "-")],
)
def test_numbers_have_three_significant_digits(value, text):
    assert number(value) == text
    assert number(float("nan")) == "-"


def test_best_is_judged_by_the_digits_shown(example_report):
    models = example_report["models"]
    models[1]["metrics"]["segm"]["AP"]["mean"] = 41.04
    assert Table(models, summary_cells).best[0] == set(), "both are shown as 41.0"
    models[1]["metrics"]["segm"]["AP"]["mean"] = 41.3
    assert Table(models, summary_cells).best[0] == {1}


def test_models_of_label_maps_have_a_table_of_their_own(example_report, tmp_path):
    stat = {"mean": 61.5, "std": None, "values": [61.5]}
    example_report["models"][1]["metrics"] = {"sem_seg": {"mIoU": stat}}
    text, page = written(example_report, tmp_path)
    assert table(text, "## Results of sem_seg") == [["model", "mIoU"], ["beta", "61.5"]]
    assert dict(zip(*table(text)[::2]))["mask AP"] == "-"
    assert "Results of sem_seg" in page


def test_the_terminal_has_the_main_table(example_report):
    example_report["models"][1]["status"] = "failed"
    header, _, alpha, beta = terminal_table(example_report).splitlines()
    assert header.split()[:3] == ["model", "mask", "AP"] and "ms, batch 1" in header
    assert alpha.startswith("alpha") and "41.0 ± 1.4" in alpha
    assert beta.startswith("beta (failed)")


def test_errors_have_a_table_a_chart_and_an_explanation(example_report, tmp_path):
    text, page = written(example_report, tmp_path)
    header, alpha, beta = table(text, "## Points of mask AP that errors cost")
    assert header == ["model", "as it is", *oracle.KINDS]
    assert dict(zip(header, alpha))["missed"] == "4.6" and beta[1] == "38.0 ± 1.4"
    assert 'data-chart="errors"' in page and oracle.KINDS["duplicate"] in page
