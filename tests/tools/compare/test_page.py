"""The report's page in a real browser, at desktop and phone width."""

import json
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.request

import pytest

from solo_d2.tools.compare.report import write_report

BROWSER = shutil.which("chromium")
pytestmark = pytest.mark.skipif(
    not (BROWSER and shutil.which("chromedriver")), reason="needs chromium and chromedriver"
)
OPTIONS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
OPTIONS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]


class Browser:
    """The few WebDriver commands that these tests need."""

    def __init__(self, profile):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(["chromedriver", f"--port={port}"], **quiet)
        self.root = f"http://127.0.0.1:{port}"
        options = {"binary": BROWSER, "args": [*OPTIONS, f"--user-data-dir={profile}"]}
        wanted = {"alwaysMatch": {"browserName": "chrome", "goog:chromeOptions": options}}
        deadline = time.monotonic() + 30
        while True:
            try:
                session = self.post("/session", {"capabilities": wanted})["sessionId"]
                break
            except OSError:
                assert time.monotonic() < deadline
                time.sleep(0.1)
        self.root += f"/session/{session}"

    def close(self):
        request = urllib.request.Request(self.root, method="DELETE")
        urllib.request.urlopen(request, timeout=60).close()  # ends the browser
        self.process.terminate()
        self.process.wait()

    def post(self, path, body):
        data = json.dumps(body).encode()
        request = urllib.request.Request(self.root + path, data, method="POST")
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.load(response)["value"]

    def open(self, path, width):
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        command = {"cmd": "Emulation.setDeviceMetricsOverride", "params": size}
        self.post("/goog/cdp/execute", command)
        self.post("/url", {"url": path.as_uri()})

    def run(self, script):
        return self.post("/execute/sync", {"script": script, "args": []})

    def wait_for(self, script):
        deadline = time.monotonic() + 30
        while not self.run(script):
            assert time.monotonic() < deadline, script
            time.sleep(0.1)


@pytest.fixture(scope="module")
def browser():
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        browser = Browser(profile)
        try:
            yield browser
        finally:
            browser.close()


ALL_DRAWN = "return document.querySelectorAll('[data-chart] svg, [data-chart] canvas').length === 6"


@pytest.mark.parametrize("width", [1400, 390])
def test_charts_are_drawn_and_nothing_overflows(browser, example_report, tmp_path, width):
    write_report(example_report, tmp_path)
    browser.open(tmp_path / "report.html", width)
    browser.wait_for(ALL_DRAWN)
    assert browser.run("return document.documentElement.scrollWidth") <= width


def test_models_can_be_hidden_and_tables_sorted(browser, example_report, tmp_path):
    write_report(example_report, tmp_path)
    browser.open(tmp_path / "report.html", 1400)
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
    browser.open(tmp_path / "report.html", 390)
    browser.run("document.querySelector('.enlarge').click()")
    assert browser.run("return document.getElementById('zoom').open")


def test_hostile_names_run_nothing(browser, example_report, tmp_path):
    name = "<script>window.hacked=1</script><img src=x onerror='window.hacked=1'>"
    text = json.dumps(example_report).replace('"alpha"', json.dumps(name))
    write_report(json.loads(text.replace('"disc"', json.dumps(name))), tmp_path)
    browser.open(tmp_path / "report.html", 1400)
    browser.wait_for(ALL_DRAWN)
    assert browser.run("return window.hacked") is None
