"""Options, inputs and KEY VALUE pairs in any order."""

import argparse

import pytest
from detectron2.config import get_cfg
from detectron2.engine import default_argument_parser

from solo_d2 import add_solo_d2_config
from solo_d2.arguments import CONFIG_ROOTS, parse, split_overrides


def test_the_known_sections_are_those_of_the_config():
    cfg = get_cfg()
    add_solo_d2_config(cfg)
    assert set(cfg) <= CONFIG_ROOTS  # later versions of Detectron2 have more


@pytest.mark.parametrize(
    "words",
    [
        "a.jpg --size 3 b.jpg MODEL.DEVICE cpu SOLVER.BASE_LR -1e-3",
        "MODEL.DEVICE cpu --size 3 SOLVER.BASE_LR -1e-3 a.jpg b.jpg",
        "--size 3 MODEL.DEVICE cpu a.jpg SOLVER.BASE_LR -1e-3 b.jpg",
        "MODEL.DEVICE cpu SOLVER.BASE_LR -1e-3 a.jpg b.jpg --size 3",
    ],
)
def test_any_order(words):
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", type=int)
    parser.add_argument("inputs", nargs="*")
    options = parse(parser, words.split())
    assert options.opts == ["MODEL.DEVICE", "cpu", "SOLVER.BASE_LR", "-1e-3"]
    assert options.inputs == ["a.jpg", "b.jpg"] and options.size == 3


def test_options_may_follow_pairs_with_the_parser_of_detectron2():
    words = ["SOLVER.MAX_ITER", "5", "--data", "a", "b", "--eval-only", "OUTPUT_DIR", "x"]
    parser = default_argument_parser()
    parser.add_argument("--data", nargs=2)
    options = parse(parser, words)
    assert options.eval_only and options.data == ["a", "b"]
    assert options.opts == ["SOLVER.MAX_ITER", "5", "OUTPUT_DIR", "x"]


def test_a_file_with_the_name_of_a_section_is_an_input(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "INPUT").mkdir()
    assert split_overrides(["INPUT", "SEED", "3"]) == (["SEED", "3"], ["INPUT"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a.jpg", "MODEL.DEVICE"], "config key MODEL.DEVICE has no value"),
        (["SEED", "--typo", "3"], "config key SEED has no value"),
        (["a.jpg", "--typo"], "unrecognized arguments: --typo"),
    ],
)
def test_what_is_wrong_is_named(capsys, words, message):
    parser = argparse.ArgumentParser()
    parser.add_argument("inputs", nargs="*")
    with pytest.raises(SystemExit) as exit_info:
        parse(parser, words)
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


def test_words_too_many_are_refused_where_there_are_no_inputs(capsys):
    with pytest.raises(SystemExit):
        parse(argparse.ArgumentParser(), ["SLOVER.BASE_LR", "1"])
    assert "SLOVER.BASE_LR 1" in capsys.readouterr().err
