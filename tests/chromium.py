"""A headless Chromium for the tests of pages."""

import json
import os
import shutil
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

BROWSER = shutil.which("chromium")
IS_INSTALLED = bool(BROWSER and shutil.which("chromedriver"))
OPTIONS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
OPTIONS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
AXE = os.environ.get("SOLO_D2_AXE")  # axe.min.js of the package axe-core


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
        wanted = {"browserName": "chrome", "goog:chromeOptions": options}
        wanted["unhandledPromptBehavior"] = "accept"  # of pages with unsaved changes
        deadline = time.monotonic() + 30
        while True:
            try:
                session = self.post("/session", {"capabilities": {"alwaysMatch": wanted}})
                break
            except OSError:
                assert time.monotonic() < deadline
                time.sleep(0.1)
        self.root += f"/session/{session['sessionId']}"

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

    def command(self, name, **parameters):
        """A command of the Chrome DevTools protocol."""
        return self.post("/goog/cdp/execute", {"cmd": name, "params": parameters})

    def open(self, url, width):
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.command("Emulation.setDeviceMetricsOverride", **size)
        self.post("/url", {"url": url})

    def run(self, script):
        return self.post("/execute/sync", {"script": script, "args": []})

    def wait_for(self, script):
        deadline = time.monotonic() + 30
        while not self.run(script):
            assert time.monotonic() < deadline, script
            time.sleep(0.1)

    def click(self, x, y, modifiers=0):
        """Click at a point of the window; modifiers: the sum of 1 Alt, 2 Ctrl, 4 Meta, 8 Shift."""
        event = {"x": x, "y": y, "button": "left", "clickCount": 1, "modifiers": modifiers}
        for kind in ("mousePressed", "mouseReleased"):
            self.command("Input.dispatchMouseEvent", type=kind, **event)

    def press(self, key, modifiers=0):
        """Press a key, named as in KeyboardEvent.key."""
        text = {"Enter": "\r"}.get(key, key if len(key) == 1 and not modifiers & 2 else "")
        for kind in ("keyDown", "keyUp"):
            self.command(
                "Input.dispatchKeyEvent", type=kind, key=key, text=text, modifiers=modifiers
            )

    def accessibility_problems(self):
        """What axe-core finds that is serious or worse: [[rule, HTML of the first element], ...]"""
        self.run(Path(AXE).read_text(encoding="utf-8"))
        script = """const done = arguments[0];
            axe.run().then(({violations}) => done(violations
                .filter(({impact}) => ["serious", "critical"].includes(impact))
                .map(({id, nodes}) => [id, nodes[0].html])));"""
        return self.post("/execute/async", {"script": script, "args": []})
