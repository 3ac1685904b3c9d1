"""The command line's verbs, and the error for an unknown one."""

import importlib.util

import pytest

from solo_d2 import __main__ as front


def test_help_lists_every_verb_and_each_is_a_tool(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["solo-d2", "--help"])
    assert front.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:]] == list(front.VERBS)
    for verb in front.VERBS:
        assert importlib.util.find_spec(f"solo_d2.tools.{verb.replace('-', '_')}") is not None


@pytest.mark.parametrize(
    ("words", "message"), [(["draw"], "unknown verb 'draw'"), ([], "no verb given")]
)
def test_other_words_are_refused_with_the_list(monkeypatch, capsys, words, message):
    monkeypatch.setattr("sys.argv", ["solo-d2", *words])
    assert front.main() == 2
    error = capsys.readouterr().err
    assert "predict" in error and message in error.splitlines()[-1]


def test_a_verb_gets_the_words_that_follow_it(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["solo-d2", "predict", "--output", "here"])
    assert front.main() == 2
    assert "no INPUT" in capsys.readouterr().err
