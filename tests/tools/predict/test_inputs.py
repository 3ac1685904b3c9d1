"""The files that an input refers to, and the names of their results."""

from pathlib import Path

import pytest

from solo_d2.errors import UserError
from solo_d2.images import UnreadableError
from solo_d2.tools.predict.inputs import Source, Video, find_sources, output_names


def test_glob_patterns_match_and_repeats_count_once(tmp_path, save_image):
    for name in ("a1.png", "a2.png", "b.png"):
        save_image(tmp_path / name)
    pattern = str(tmp_path / "a*.png")
    sources = find_sources([pattern, str(tmp_path / "a1.png")], exclude=tmp_path / "out")
    assert [source.name.name for source in sources] == ["a1.png", "a2.png"]


def test_a_folder_gives_its_images_and_videos_also_in_subfolders(tmp_path, save_image):
    for name in ("a.png", "sub/a.png", "b.jpg"):
        save_image(tmp_path / name)
    (tmp_path / "clip.mp4").touch()
    (tmp_path / "notes.txt").write_text("not an image")
    save_image(tmp_path / "out" / "old.png")
    sources = find_sources([str(tmp_path)], exclude=tmp_path / "out")
    assert [str(source.name) for source in sources] == ["a.png", "b.jpg", "clip.mp4", "sub/a.png"]
    assert [source.is_video for source in sources] == [False, False, True, False]


def test_input_that_matches_nothing_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none\*\.png"):
        find_sources([str(tmp_path / "none*.png")], exclude=tmp_path / "out")


def test_numbers_are_webcams_and_urls_are_videos(tmp_path):
    url = "rtsp://host:554/live?id=1"
    sources = find_sources(["0", url], exclude=tmp_path / "out")
    assert sources == [Source("0", Path("webcam0")), Source(url, Path("host_554_live_id_1"))]
    assert all(source.is_video and source.is_live for source in sources)
    assert [str(n) for n in output_names(sources)] == ["webcam0.mp4", "host_554_live_id_1.mp4"]


def test_same_names_do_not_overwrite_each_other(tmp_path, save_image):
    one, two = tmp_path / "one", tmp_path / "two"
    for path in (one / "a.png", two / "a.png", two / "a.tiff", two / "a.PNG", two / "a_2.png"):
        save_image(path, format="PNG")
    files = [str(p) for p in (*sorted(one.iterdir()), *sorted(two.iterdir()))]
    names = output_names(find_sources(files, exclude=tmp_path / "out"))
    assert len(names) == 5
    assert len({str(n).lower() for n in names}) == 5
    assert Path("a.tiff.png") in names


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("text.mp4", "^not a video$"),
        ("http://127.0.0.1:1/x.mp4", "^not a webcam or video that can"),
    ],
)
def test_what_cannot_be_opened_is_refused(tmp_path, monkeypatch, location, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.mp4").write_text("hello")
    with pytest.raises(UnreadableError, match=message):
        Video(Source(location, Path("x.mp4")))
