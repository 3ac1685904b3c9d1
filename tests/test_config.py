"""Reading config files: by path or by name, with their bases, and without running code."""

from pathlib import Path

import pytest

from solo_d2 import get_config_file
from solo_d2.config import load_config
from solo_d2.errors import UserError

NAME = "SOLOv2/SOLOv2_R50_3x_official.yaml"


def test_a_name_and_a_path_give_the_same_config():
    assert load_config(NAME) == load_config(get_config_file(NAME))


def test_files_are_merged_over_those_they_are_based_on(tmp_path):
    (tmp_path / "grand.yaml").write_text("MODEL:\n  SOLO: {NUM_CONVS: 1, CONV_DIM: 64}\n")
    (tmp_path / "other.yaml").write_text("MODEL:\n  SOLO: {CONV_DIM: 96}\n")
    (tmp_path / "base.yaml").write_text('_BASE_: "grand.yaml"\nMODEL:\n  SOLO: {NUM_CONVS: 2}\n')
    (tmp_path / "leaf.yaml").write_text('_BASE_: ["base.yaml", "other.yaml"]\nVERSION: 2\n')
    solo = load_config(str(tmp_path / "leaf.yaml"), opts=["SOLVER.MAX_ITER", 7]).MODEL.SOLO
    assert (solo.NUM_CONVS, solo.CONV_DIM) == (2, 96)


def test_a_file_in_the_folder_comes_before_a_packaged_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path(NAME).parent.mkdir()
    Path(NAME).write_text("SOLVER: {MAX_ITER: 3}\nVERSION: 2\n")
    assert load_config(NAME).SOLVER.MAX_ITER == 3


def test_an_unknown_name_is_one_line_with_similar_ones():
    with pytest.raises(UserError, match="no config file SOLOv2/SOLOv2_R50.yaml") as caught:
        load_config("SOLOv2/SOLOv2_R50.yaml")
    assert "SOLOv2/SOLOv2_R50_3x.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("tag", ["apply:os.mkdir", "new:os.mkdir"])
@pytest.mark.parametrize("place", ["leaf", "base"])
def test_a_file_with_code_is_refused_and_nothing_is_run(tmp_path, tag, place):
    made = tmp_path / "made"
    with_code = f"OUTPUT_DIR: !!python/object/{tag} ['{made}']\nVERSION: 2\n"
    (tmp_path / "base.yaml").write_text(with_code)
    leaf = tmp_path / "leaf.yaml"
    leaf.write_text(with_code if place == "leaf" else '_BASE_: "base.yaml"\n')
    with pytest.raises(UserError, match="Python objects are not allowed.*os.mkdir") as caught:
        load_config(str(leaf))
    assert str(leaf) in str(caught.value) and "\n" not in str(caught.value)
    assert not made.exists()


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("", "not a mapping of keys to values"),
        ("just words", "not a mapping of keys to values"),
        ("- 1\n- 2", "not a mapping of keys to values"),
        ("MODEL: [", "expected"),
        ('_BASE_: "broken.yaml"', "its own _BASE_"),
        ('_BASE_: "nowhere.yaml"', "nowhere.yaml"),
        ("MODEL: 3\nVERSION: 2", "MODEL"),
        ("SOLVER: {MAX_ITER: many}\nVERSION: 2", "SOLVER.MAX_ITER"),
        ("MODEL: {SOLO: {NUM_CLASES: 3}}\nVERSION: 2", "MODEL.SOLO.NUM_CLASES"),
    ],
)
def test_what_is_no_config_is_one_line(tmp_path, text, complaint):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=complaint) as caught:
        load_config(str(path))
    assert str(caught.value).startswith(f"config {path}: ") and "\n" not in str(caught.value)


def test_keys_of_older_runs_are_ignored(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("INPUT:\n  KEEP_CROWD: True\nMODEL:\n  ADAPTIS:\n    BACKBONE_LR_FACTOR: 0.1\n")
    cfg = load_config(str(file))
    assert "KEEP_CROWD" not in cfg.INPUT
