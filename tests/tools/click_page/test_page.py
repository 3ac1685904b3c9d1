"""The page in a real browser: mouse, keyboard, files, accessibility."""

import json
import threading

import pytest
from chromium import AXE
from colored_boxes import BOXES

from solo_d2.data.coco import read_coco
from solo_d2.tools import check
from solo_d2.tools.click_page.server import start_server

pytestmark = pytest.mark.browser
ALT, CONTROL, SHIFT = 1, 2, 8
ENTRIES = "return [...document.querySelectorAll('#objects button')].map(b => b.innerText)"
READY = "return page !== undefined && page !== null && waiting === 0"
# x and y in the window of an image's pixel
WHERE = """const box = canvas.getBoundingClientRect(), scale = box.width / page.width;
return [box.left + ({0} + 0.5) * scale, box.top + ({1} + 0.5) * scale]"""


@pytest.fixture
def address(app):
    server = start_server(app, 0)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.port}/"
    server.shutdown()
    thread.join()


@pytest.fixture
def open_page(browser, address):
    def open_page(width=1400, image="one.png"):
        browser.open("about:blank", width)  # so that the page is loaded anew
        browser.open(f"{address}#{image}", width)
        browser.wait_for(READY)
        return browser

    yield open_page
    browser.open("about:blank", 1400)


def click(browser, x, y, modifiers=0):
    browser.run("canvas.scrollIntoView({block: 'center'})")
    browser.click(*browser.run(WHERE.format(x, y)), modifiers)
    browser.wait_for(READY)


def press(browser, *keys, modifiers=0):
    for key in keys:
        browser.press(key, modifiers)
    browser.wait_for(READY)


def areas(browser):
    return browser.run("return page.objects.map(o => o.area)")


def pixel(browser, x, y):
    return browser.run(f"return [...context.getImageData({x}, {y}, 1, 1).data].slice(0, 3)")


def use(browser, identity):
    browser.run(f"document.getElementById('{identity}').click()")
    browser.wait_for(READY)


def test_a_click_shows_a_mask_and_more_clicks_change_it(open_page):
    browser = open_page()
    red, green = pixel(browser, 8, 16), pixel(browser, 45, 45)
    click(browser, 10, 10)
    assert [x.splitlines()[0] for x in browser.run(ENTRIES)] == ["1 disc"]
    assert pixel(browser, 8, 16) != red and pixel(browser, 45, 45) == green
    blue = pixel(browser, 15, 37), pixel(browser, 70, 37)
    click(browser, 15, 40, CONTROL)  # also this, and what looks the same
    assert areas(browser) == [20 * 15 + 2 * 100]
    click(browser, 70, 40, SHIFT)  # but not that
    assert areas(browser) == [20 * 15 + 100]
    assert pixel(browser, 15, 37) != blue[0] and pixel(browser, 70, 37) == blue[1]
    click(browser, 70, 42, ALT)
    assert areas(browser) == [20 * 15 + 100]
    assert browser.run("return selected.labels") == [1, 1, 0, 0]
    click(browser, 0, 0)  # the background
    assert areas(browser) == [400, 80 * 60 - 20 * 15 - 20 * 40 - 2 * 100]
    click(browser, 15, 40)  # known
    assert len(areas(browser)) == 2 and browser.run("return page.objects.indexOf(selected)") == 0


def test_what_was_not_found_by_clicks_can_be_changed_by_clicks(open_page):
    browser = open_page()
    use(browser, "automatic")
    click(browser, 10, 10)
    click(browser, 15, 40, CONTROL)
    assert areas(browser) == [300 + 200, 800]
    click(browser, 70, 40, SHIFT)
    assert areas(browser) == [300 + 100, 800]


def test_the_tools_do_what_the_keys_do(open_page):
    browser = open_page()
    click(browser, 10, 10)
    for tool, x, expected in (("more", 45, 1100), ("less", 10, 1100 - 20 * 8), ("more", 10, 1100)):
        browser.run(f"document.querySelector('[value={tool}]').click()")
        click(browser, x, 12)
        assert areas(browser) == [expected]


def test_undo_class_and_delete(open_page):
    browser = open_page()
    click(browser, 10, 10)
    click(browser, 45, 30)
    browser.run("$('class').value = 'rod'; $('class').dispatchEvent(new Event('change'))")
    classes = "return page.objects.map(o => o.class)"
    assert browser.run(classes) == ["disc", "rod"]
    use(browser, "undo")
    assert browser.run(classes) == ["disc", "disc"]
    press(browser, "y", modifiers=CONTROL)
    assert browser.run(classes) == ["disc", "rod"]
    use(browser, "delete")
    assert areas(browser) == [300]
    press(browser, "z", modifiers=CONTROL)
    assert areas(browser) == [300, 800]
    press(browser, "z", "z", "z", "z", modifiers=CONTROL)
    assert areas(browser) == [] and browser.run("return $('undo').disabled && $('save').disabled")


def test_the_keyboard_is_enough(open_page, images):
    browser = open_page()
    browser.run("canvas.focus()")
    middle = browser.run("return crosshair")
    press(browser, "ArrowLeft", "ArrowUp", modifiers=SHIFT)
    assert browser.run("return crosshair") == [middle[0] - 1, middle[1] - 1]
    press(browser, "ArrowRight")
    assert browser.run("return crosshair[0]") >= middle[0]
    browser.run("crosshair = [45, 30]")
    press(browser, "Enter")
    browser.run("crosshair = [10, 10]")
    press(browser, "Enter", modifiers=CONTROL)
    assert areas(browser) == [1100]
    browser.run("crosshair = [10, 12]")
    press(browser, "Enter", modifiers=SHIFT)
    assert areas(browser) == [1100 - 20 * 8]
    press(browser, "a")
    assert areas(browser) == [1100 - 20 * 8, 20 * 8]
    press(browser, "Delete")
    press(browser, "s", modifiers=CONTROL)
    assert len(read_coco(images / "annotations.json", images).document["annotations"]) == 1
    press(browser, ",")
    assert browser.run("return page.name") == "more/zwei & ü.png"


def test_saved_objects_pass_the_check_and_are_there_again(open_page, images):
    browser = open_page()
    use(browser, "automatic")
    assert areas(browser) == [300, 800]
    assert "2 more objects" in browser.run("return $('status').textContent")
    use(browser, "previous")
    click(browser, 80 - 45, 30)
    assert browser.run("return $('image').selectedOptions[0].textContent").endswith("(1) •")
    use(browser, "save")
    file = images / "annotations.json"
    assert browser.run("return $('status').textContent") == f"Saved 3 objects in {file}"
    data = 2 * [str(file), str(images)]
    assert check.main(["--config-file", "quick/solov2_shapes.yaml", "--data", *data]) == 0
    document = read_coco(file, images).document
    boxes = {tuple(a["bbox"]) for a in document["annotations"]}
    (left, top, right, bottom), (x1, y1, x2, y2) = BOXES[:2]
    assert (left, top, right - left, bottom - top) in boxes and (20, y1, x2 - x1, y2 - y1) in boxes
    open_page()
    assert areas(browser) == [300, 800]
    assert browser.run("return $('save').disabled")


def test_errors_are_shown(open_page, images):
    (images / "broken.png").write_bytes(b"no image")
    browser = open_page()
    use_broken = "$('image').value = 'broken.png'; $('image').dispatchEvent(new Event('change'))"
    browser.run(use_broken)
    browser.wait_for("return $('status').classList.contains('bad')")
    assert "not an image" in browser.run("return $('status').textContent")
    use(browser, "next")
    assert browser.run("return page.name") == "more/zwei & ü.png"


def test_hostile_names_run_nothing(open_page, images):
    name = "<img src=x onerror=window.hacked=1>.png"
    (images / "one.png").rename(images / name)
    document = {"images": [], "annotations": [], "categories": [{"id": 1, "name": name}]}
    (images / "annotations.json").write_text(json.dumps(document))
    browser = open_page(image="")
    click(browser, 10, 10)
    assert browser.run("return page.name") == name
    assert browser.run("return window.hacked") is None


@pytest.mark.parametrize("width", [1400, 390])
def test_nothing_is_wider_than_the_window(open_page, width):
    browser = open_page(width)
    use(browser, "automatic")
    assert browser.run("return document.documentElement.scrollWidth") <= width
    click(browser, 70, 40)
    assert areas(browser) == [300, 800, 200]
    before = browser.run("return canvas.clientWidth")
    use(browser, "in")
    assert browser.run("return canvas.clientWidth") > before
    assert browser.run("return document.documentElement.scrollWidth") <= width
    click(browser, 40, 30)  # the middle: selected, also in the enlarged image
    assert browser.run("return selected.area") == 800


@pytest.mark.skipif(not AXE, reason="needs axe-core (SOLO_D2_AXE=axe.min.js)")
@pytest.mark.parametrize("width", [1400, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_is_accessible(open_page, width, scheme):
    browser = open_page(width)
    preference = {"name": "prefers-color-scheme", "value": scheme}
    browser.command("Emulation.setEmulatedMedia", features=[preference])
    assert browser.run(f"return matchMedia('(prefers-color-scheme: {scheme})').matches")
    use(browser, "automatic")
    browser.run("document.querySelector('details').open = true")
    assert browser.accessibility_problems() == []
