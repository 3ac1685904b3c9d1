"""The report's page in a real browser, at desktop and phone width."""

import json

import pytest

from solo_d2.tools.compare.report import write_report

pytestmark = pytest.mark.browser

ALL_DRAWN = "return document.querySelectorAll('[data-chart] svg, [data-chart] canvas').length === 6"


@pytest.mark.parametrize("width", [1400, 390])
def test_charts_are_drawn_and_nothing_overflows(browser, example_report, tmp_path, width):
    write_report(example_report, tmp_path)
    browser.open((tmp_path / "report.html").as_uri(), width)
    browser.wait_for(ALL_DRAWN)
    assert browser.run("return document.documentElement.scrollWidth") <= width


def test_models_can_be_hidden_and_tables_sorted(browser, example_report, tmp_path):
    write_report(example_report, tmp_path)
    browser.open((tmp_path / "report.html").as_uri(), 1400)
    browser.wait_for(ALL_DRAWN)
    names = "return [...document.querySelectorAll('#results tbody')[0].rows].filter(r => !r.hidden)"
    names += ".map(r => r.cells[0].dataset.v)"
    assert browser.run(names) == ["alpha", "beta"]
    click = "document.querySelectorAll('#results th button')[1].click();"
    browser.run(click * 2)  # best first, then worst first
    assert browser.run(names) == ["beta", "alpha"]
    browser.run("document.querySelector('[data-toggle=\"0\"]').click()")
    assert browser.run(names) == ["beta"]


def test_a_panel_can_be_enlarged(browser, example_report, tmp_path):
    write_report(example_report, tmp_path)
    browser.open((tmp_path / "report.html").as_uri(), 390)
    browser.run("document.querySelector('.enlarge').click()")
    assert browser.run("return document.getElementById('zoom').open")


def test_hostile_names_run_nothing(browser, example_report, tmp_path):
    name = "<script>window.hacked=1</script><img src=x onerror='window.hacked=1'>"
    text = json.dumps(example_report).replace('"alpha"', json.dumps(name))
    write_report(json.loads(text.replace('"disc"', json.dumps(name))), tmp_path)
    browser.open((tmp_path / "report.html").as_uri(), 1400)
    browser.wait_for(ALL_DRAWN)
    assert browser.run("return window.hacked") is None
