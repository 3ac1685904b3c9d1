"""The command: its arguments, its errors, and a real AdaptIS model behind the page."""

import json
import threading

import pytest
from detectron2.modeling import build_model
from werkzeug.test import Client

from solo_d2.checkpoint.checkpointer import Checkpointer
from solo_d2.config import load_config
from solo_d2.tools.click_page import command, server

CONFIG = """
VERSION: 2
MODEL:
  META_ARCHITECTURE: "AdaptIS"
  DEVICE: "cpu"
  WEIGHTS: ""
  BACKBONE: {NAME: "build_adaptis_unet_backbone"}
  UNET: {WIDTH: 4, LEVELS: 3}
  ADAPTIS: {CONV_DIM: 4, SEMANTIC_DIM: 4, NUM_THINGS: 1}
INPUT: {MIN_SIZE_TEST: 32, FORMAT: "RGB"}
"""


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    (folder / "config.yaml").write_text(CONFIG)
    cfg = load_config(str(folder / "config.yaml"))
    Checkpointer(build_model(cfg), str(folder), thing_classes=["rod"]).save("model_final")
    return folder


@pytest.fixture
def served(monkeypatch):
    """The WSGI applications of servers that would have been started."""
    apps = []

    def start(app, port):
        apps.append(app)
        return type("Server", (), {"host": "here", "port": port, "serve_forever": lambda _: None})()

    monkeypatch.setattr(server, "start_server", start)
    return apps


def test_a_folder_is_opened_with_a_real_model(run_folder, images, served, capsys):
    arguments = ["--weights", str(run_folder), "--images", str(images), "--port", "1234"]
    assert command.main([*arguments, "--classes", "disc", "bar", "MODEL.DEVICE", "cpu"]) == 0
    output = capsys.readouterr().out
    assert f"2 images, annotations in {images / 'annotations.json'}" in output
    assert "http://here:1234/" in output
    client, (host, origin) = Client(served[0]), ("http://localhost", "http://localhost")
    assert client.get("/state", base_url=host).json["classes"] == ["rod", "disc", "bar"]

    def post(path, **content):
        content["image"] = "one.png"
        answer = client.post(path, json=content, base_url=host, headers={"Origin": origin})
        assert answer.status_code == 200
        return answer.json.get("objects")

    found = post("/click", points=[[45, 30], [10, 10]], labels=[1, 0], known=[], base=[])
    assert all(x["class"] == "rod" and sum(x["counts"]) <= 60 * 80 for x in found)
    found += post("/automatic", known=[x["counts"] for x in found])
    post("/save", objects=found)
    (embedded,) = served[0]._segmenter._cache.values()
    assert embedded.bytes > 60 * 80  # what bounds the cache
    document = json.loads((images / "annotations.json").read_text())
    assert len(document["annotations"]) == len(found)
    assert [c["id"] for c in document["categories"]] == [1, 2, 3]
    outside = {"image": "one.png", "points": [[80, 0]], "labels": [1], "known": [], "base": []}
    answer = client.post("/click", json=outside, base_url=host, headers={"Origin": origin})
    assert answer.status_code == 422 and "80" in answer.json["error"]


def test_the_server_runs_until_it_is_stopped(run_folder, images, monkeypatch, capsys):
    start, servers = server.start_server, []

    def keep(app, port):
        servers.append(start(app, port))
        threading.Timer(0.1, servers[0].shutdown).start()
        return servers[0]

    monkeypatch.setattr(server, "start_server", keep)
    output = str(images / "other.json")
    arguments = ["--weights", str(run_folder), "--images", str(images), "--output", output]
    assert command.main([*arguments, "--port", "0"]) == 0
    assert f"http://127.0.0.1:{servers[0].port}/" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--weights", "{run}", "--images", "no such"), "no folder no such"),
        (("--images", "{images}"), "give --weights"),
        (("--weights", "{run}", "--images", "{run}"), "no image in"),
        (("--weights", "nuclei", "--images", "{images}"), "needs AdaptIS, not "),
        (("--weights", "{run}", "--images", "{images}", "--output", "{run}/config.yaml"), "json"),
    ],
)
def test_wrong_input_gives_one_line(run_folder, images, served, capsys, arguments, message):
    words = [word.format(run=run_folder, images=images) for word in arguments]
    assert command.main(words) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert message in line and not served


def test_werkzeug_is_named_where_it_is_missing(images, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert command.main(["--weights", "nuclei", "--images", str(images)]) == 2
    assert "pip install werkzeug" in capsys.readouterr().err
