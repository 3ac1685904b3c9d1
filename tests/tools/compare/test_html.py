"""The page: nothing is loaded, no name becomes markup, the plots say what they should."""

import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from solo_d2.tools.compare import plots
from solo_d2.tools.compare.gallery import Entry
from solo_d2.tools.compare.html import page
from solo_d2.tools.compare.markup import element, escape
from solo_d2.tools.compare.raster import write_picture

VOID = {"meta", "input"}


class Page(HTMLParser):
    """Checks that elements nest; keeps (tag, attributes) and the text of each table row."""

    def __init__(self, source):
        super().__init__()
        self.open, self.elements, self.rows = [], [], []
        self.feed(source)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID and tag != "wbr":
            self.open.append(tag)
        if tag == "tr":
            self.rows.append("")

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "tr" in self.open:
            self.rows[-1] += data + " "

    def all(self, tag, **attributes):
        found = [a for t, a in self.elements if t == tag]
        return [
            a for a in found if all(a.get(k.replace("_", "-")) == v for k, v in attributes.items())
        ]


def make(report):
    return page(report, [Entry(report, e, i) for i, e in enumerate(report["gallery"])])


def test_page_is_whole_and_loads_nothing(example_report):
    source = make(example_report)
    found = Page(source)
    links = [a[k] for _, a in found.elements for k in ("src", "href") if k in a]
    assert links and all(link.startswith(("#", "data:image/jpeg;base64,")) for link in links)
    targets = {a["id"] for _, a in found.elements if "id" in a}
    assert {link[1:] for link in links if link.startswith("#")} <= targets
    assert "url(" not in source and "@import" not in source
    policy = found.all("meta", http_equiv="Content-Security-Policy")[0]["content"]
    assert policy.startswith("default-src 'none'")


def test_ids_are_unique(example_report):
    ids = [a["id"] for _, a in Page(make(example_report)).elements if "id" in a]
    assert len(ids) == len(set(ids))


def test_no_name_becomes_markup(example_report):
    nasty = "<script>alert(1)</script>\"'&\x07"
    text = json.dumps(example_report)
    for name in ("alpha", "disc", "toys_val", "a processor", "MODEL.FPN.OUT_CHANNELS"):
        text = text.replace(json.dumps(name), json.dumps(nasty + name))
    report = json.loads(text)
    report["models"][0].update(status="failed", error=nasty)
    found = Page(make(report))
    assert len(found.all("script")) == 1
    assert not [a for _, a in found.elements if any(k.startswith("on") for k in a)]


def test_table_can_be_sorted_by_values_and_marks_what_is_missing(example_report):
    example_report["models"][1]["flops"] = None
    found = Page(make(example_report))
    heads = [a["data-better"] for a in found.all("th") if "data-better" in a]
    assert heads.count("max") >= 8 and heads.count("min") >= 8
    values = [a["data-v"] for a in found.all("td") if "data-v" in a]
    assert "41.0" in values and "" in values
    assert [float(v) for v in values if v]
    assert any(re.search(r"beta .*38\.0.* - ", row) for row in found.rows)


def test_every_choice_of_the_selects_has_something_to_show(example_report):
    source = make(example_report)
    for part in source.split('<div class="choices">')[1:]:
        options = [re.findall(r"<option>(.*?)</option>", s) for s in part.split("<select>")[1:]]
        choices = set(re.findall(r'data-choice="(.*?)"', part))
        assert "/".join(o[0] for o in options[: 3 if len(options) >= 3 else 1]) in choices


def test_every_model_can_be_switched_off(example_report):
    found = Page(make(example_report))
    assert [a["data-toggle"] for a in found.all("input") if "data-toggle" in a] == ["0", "1"]
    for index in "01":
        tags = {t for t, a in found.elements if a.get("data-model") == index}
        assert {"tr", "td", "th", "g", "div"} <= tags


def test_failed_models_and_unfair_differences_are_at_the_top(example_report):
    example_report["models"][1].update(status="failed", error="out of memory")
    example_report["differences"].append(
        {"key": "SOLVER.BASE_LR", "values": {"alpha": 1, "beta": 2}, "group": "forbidden"}
    )
    header = make(example_report).split("</header>")[0]
    assert "out of memory" in header and "BASE_<wbr>LR" in header


def test_without_any_result_the_page_says_so(example_report):
    names = ("name", "config", "architecture")
    example_report["models"] = [{k: m[k] for k in names} for m in example_report["models"]]
    example_report["gallery"] = []
    source = make(example_report)
    Page(source)
    assert "Nothing is measured yet" in source and "<svg" not in source


def test_stages_of_a_training_follow_each_other(example_report):
    model = example_report["models"][0]
    first = model["training_curves"][0]
    model["training_curves"] = [{**first, "stage": "one"}, {**first, "stage": "two"}]
    example_report["models"] = [model]
    (_, plot), *_ = plots.validation_plots(example_report)
    one, two = ElementTree.fromstring(plot).findall(".//{*}polyline")
    xs = [[float(p.split(",")[0]) for p in line.get("points").split()] for line in (one, two)]
    assert xs[0][0] < xs[0][1] < xs[1][0] < xs[1][1]


def test_bars_add_up_to_the_mean_time(example_report):
    (name, plot), _ = plots.time_plots(example_report)
    assert name == "batch 1"
    widths = [
        float(r.get("width")) for r in ElementTree.fromstring(plot).iter() if r.get("data-tip")
    ]
    alpha, beta = sum(widths[:4]), sum(widths[4:])
    assert alpha / beta == pytest.approx(30 / 45, abs=0.01)
    assert "30.0 ms" in plot and "45.0 ms" in plot


points = st.lists(st.tuples(st.floats(60, 490), st.floats(30, 270)), min_size=1, max_size=12)


@settings(deadline=None)
@given(points, st.data())
def test_labels_overlap_neither_labels_nor_points(where, data):
    names = [data.draw(st.text("abc ", min_size=1, max_size=26)) for _ in where]
    bounds = (48.0, 28.0, 498.0, 274.0)
    boxes = plots.label_boxes(where, names, bounds)
    placed = [(i, box) for i, box in enumerate(boxes) if box]
    assert placed or len(where) > 1, "a single label always has room"
    for i, box in placed:
        assert box[0] >= 48 and box[1] >= 28 and box[2] <= 498 and box[3] <= 274
        assert not any(plots.overlap(box, other) for j, other in placed if j != i)
        for x, y in where[:i] + where[i + 1 :]:
            assert not (box[0] < x < box[2] and box[1] < y < box[3])


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_axes_have_a_few_ticks_inside(low, size):
    axis = plots.Axis.around("x", [low, low + size])
    ticks = axis.ticks()
    assert 2 <= len(ticks) <= 7
    assert all(-1e-6 <= axis.at(t) <= 1 + 1e-6 for t in ticks)
    assert 0 <= axis.at(low) < axis.at(low + size) <= 1 or low + size == low


@given(st.floats(1e-5, 1e5), st.floats(10, 1e8))
def test_logarithmic_axes_have_a_few_ticks_inside(low, ratio):
    axis = plots.Axis.around("x", [low, low * ratio], log_from=8)
    assert axis.log
    assert 1 <= len(axis.ticks()) <= 12
    assert all(-1e-9 <= axis.at(t) <= 1 + 1e-9 for t in axis.ticks())


@given(st.text())
def test_any_text_is_valid_xml_once_escaped(text):
    ElementTree.fromstring(element("g", text, title=text))
    assert "<" not in escape(text)


def test_pictures_of_charts_hide_what_is_hidden(tmp_path):
    bar = {"x": 0, "y": 0, "width": 50, "height": 50}
    rect = element("rect", fill="var(--ink)", **bar)
    for hidden, name in ((True, "a.png"), (False, "b.png")):
        svg = plots.svg(50, 50, element("g", rect, hidden=hidden))
        write_picture(svg, tmp_path / name, scale=1)
    assert Image.open(tmp_path / "a.png").convert("L").getpixel((25, 25)) == 255
    assert Image.open(tmp_path / "b.png").convert("L").getpixel((25, 25)) < 60
