"""What the server answers, and whom it refuses."""

import io
import json
import threading
import urllib.request

import numpy as np
import pytest
from colored_boxes import BOXES, HEIGHT, WIDTH, box_mask
from PIL import Image
from werkzeug.test import Client

from solo_d2.tools.click_page.segmenter import describe
from solo_d2.tools.click_page.server import start_server

HOST = "http://127.0.0.1:8765"
ORIGIN = {"Origin": HOST}


@pytest.fixture
def client(app):
    return Client(app)


def get(client, path, **headers):
    return client.get(path, base_url=HOST, headers=headers)


def post(client, path, content, headers=ORIGIN, base_url=HOST):
    return client.post(path, json=content, base_url=base_url, headers=headers)


def test_the_state_lists_images_classes_and_colors(client):
    state = get(client, "/state").json
    assert state["images"] == ["more/zwei & ü.png", "one.png"]
    assert (state["classes"], state["counts"]) == (["rod", "disc"], {})
    assert state["colors"][0] == [255, 82, 82]


def test_images_are_shown_upright_in_a_format_of_browsers(images, client):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned
    pixels = np.zeros((8, 24), np.uint16)
    pixels[:, :8] = 65535
    Image.fromarray(pixels).save(images / "turned.tif", exif=exif)
    assert "turned.tif" in get(client, "/state").json["images"]
    answer = get(client, "/pixels?image=turned.tif")
    shown = np.asarray(Image.open(io.BytesIO(answer.data)))
    assert answer.mimetype == "image/jpeg" and shown.shape == (24, 8, 3)
    assert shown[:8].min() > 250 and shown[8:].max() < 5


def test_from_a_click_to_the_file(client, images):
    path = "/objects?image=one.png"
    assert get(client, path).json == {"height": HEIGHT, "width": WIDTH, "objects": []}
    content = {"image": "one.png", "points": [[45, 30]], "labels": [1], "known": [], "base": []}
    (found,) = post(client, "/click", content).json["objects"]
    assert found["area"] == 20 * 40
    known = {"image": "one.png", "known": [found["counts"]]}
    (more,) = post(client, "/automatic", known).json["objects"]
    assert more["class"] == "rod"
    everything = describe(np.ones((HEIGHT, WIDTH), bool))["counts"]
    assert post(client, "/click", content | {"known": [everything]}).json == {"objects": []}
    assert post(client, "/save", {"image": "one.png", "objects": [found, more]}).status_code == 200
    assert [x["box"] for x in get(client, path).json["objects"]] == [found["box"], more["box"]]
    assert get(client, "/state").json["counts"] == {"one.png": 2}
    assert len(json.loads((images / "annotations.json").read_text())["annotations"]) == 2


def test_a_mistake_is_named(client, images):
    (images / "broken.png").write_bytes(b"no image")
    get(client, "/state")
    assert "not an image" in get(client, "/objects?image=broken.png").json["error"]
    entry = {"class": "cat", "counts": describe(box_mask(*BOXES[0]))["counts"]}
    answer = post(client, "/save", {"image": "one.png", "objects": [entry]})
    assert (answer.status_code, answer.json) == (422, {"error": "there is no class 'cat'"})


@pytest.mark.parametrize(
    "name",
    [
        *("../secret.png", "../images/one.png", "/etc/passwd", "link.png", "linked/secret.png"),
        *("inside.png", "annotations.json", "more/../one.png", "./one.png", "", ".", "more", "a\0"),
    ],
)
def test_nothing_but_the_images_can_be_read(client, images, name, tmp_path):
    (tmp_path / "other").mkdir()
    for folder in (tmp_path, tmp_path / "other"):
        Image.new("RGB", (8, 8)).save(folder / "secret.png")
    (images / "link.png").symlink_to(tmp_path / "secret.png")
    (images / "inside.png").symlink_to(images / "one.png")
    (images / "linked").symlink_to(tmp_path / "other")
    (images / "annotations.json").write_text("{}")
    assert get(client, "/state").json["images"] == ["more/zwei & ü.png", "one.png"]
    for path in ("/pixels", "/objects"):
        answer = client.get(path, base_url=HOST, query_string={"image": name})
        assert answer.status_code == 404
    content = {
        "image": name,
        "points": [[1, 1]],
        "labels": [1],
        "known": [],
        "base": [],
        "objects": [],
    }
    for path in ("/click", "/automatic", "/save"):
        assert post(client, path, content).status_code == 404


def test_an_image_that_became_a_link_is_not_read(client, images, tmp_path):
    assert get(client, "/pixels?image=one.png").status_code == 200
    (images / "one.png").rename(tmp_path / "secret.png")
    (images / "one.png").symlink_to(tmp_path / "secret.png")
    assert get(client, "/pixels?image=one.png").status_code == 404


@pytest.mark.parametrize(
    "path", ["/page.py", "/static/page.js", "/../server.py", "/state/", "/save"]
)
def test_there_are_no_other_paths(client, path):
    assert get(client, path).status_code == 404


def test_other_names_of_this_machine_are_refused(client):
    # a page of evil.example whose name leads to 127.0.0.1 (DNS rebinding)
    for host in ("evil.example", "evil.example:8765", "127.0.0.1.evil.example", "192.168.0.7"):
        assert client.get("/state", base_url=f"http://{host}").status_code == 400
        rebound = post(client, "/save", {}, {"Origin": f"http://{host}"}, f"http://{host}")
        assert rebound.status_code == 400
    for host in ("localhost:9000", "127.0.0.1"):  # through an SSH tunnel
        assert client.get("/state", base_url=f"http://{host}").status_code == 200


def test_other_pages_can_neither_change_nor_read_anything(client, images):
    content = {"image": "one.png", "objects": []}
    for origin in ("https://evil.example", "http://127.0.0.1:1", "null", None):
        headers = {"Origin": origin} if origin else {}
        assert post(client, "/save", content, headers).status_code == 403
    text = {"data": json.dumps(content), "content_type": "text/plain"}  # without a preflight
    assert client.post("/save", base_url=HOST, headers=ORIGIN, **text).status_code == 403
    assert not (images / "annotations.json").exists()
    for site in ("cross-site", "same-site"):
        answer = get(client, "/pixels?image=one.png", **{"Sec-Fetch-Site": site})
        assert answer.status_code == 403
        assert get(client, "/", **{"Sec-Fetch-Site": site}).status_code == 200
    assert get(client, "/state", **{"Sec-Fetch-Site": "same-origin"}).status_code == 200


def test_answers_forbid_content_from_elsewhere(client):
    for path in ("/", "/page.js", "/page.css", "/state", "/pixels?image=one.png", "/none"):
        headers = get(client, path).headers
        policy = dict(x.split(" ", 1) for x in headers["Content-Security-Policy"].split("; "))
        assert policy["default-src"] == "'none'" and policy["script-src"] == "'self'"
        assert policy["frame-ancestors"] == "'none'"
        assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
        assert headers["X-Content-Type-Options"] == "nosniff"


def test_only_this_machine_is_served(app):
    server = start_server(app, 0)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        assert server.server_address[0] == "127.0.0.1"
        with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/", timeout=30) as answer:
            assert b"<canvas" in answer.read()
        with pytest.raises(OSError, match="127.0.0.1"):
            start_server(app, server.port)
    finally:
        server.shutdown()
        thread.join()


def test_the_size_of_a_request_is_limited(client):
    content = {"image": "one.png", "objects": ["x" * (65 * 1024**2)]}
    assert post(client, "/save", content).status_code == 413
