"""What a training prints: the epoch in each line, a progress bar on terminals only."""

import io
import logging
import sys

import pytest
from detectron2.evaluation import DatasetEvaluators
from detectron2.utils.events import EventStorage

from solo_d2.engine import console
from solo_d2.errors import UserError


@pytest.mark.parametrize(
    ("iteration", "max_iter", "epoch", "text"),
    [(319, 3000, 100, "epoch 3.2/30  "), (2, 3, 6.5, "epoch 0.5/0.5  ")],
)
def test_a_line_about_the_training_begins_with_the_epoch(caplog, iteration, max_iter, epoch, text):
    printer = console.epoch_printer(max_iter, epoch)
    with caplog.at_level(logging.INFO), EventStorage(iteration) as storage:
        storage.put_scalars(total_loss=1.5, time=2.0)
        printer.write()
    (line,) = caplog.messages
    assert line.startswith(text)
    assert f"iter: {iteration}  total_loss: 1.5" in line and "eta: " in line


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(("stream", "shown"), [(Terminal, True), (io.StringIO, False)])
def test_an_evaluation_shows_its_progress_on_a_terminal_only(monkeypatch, stream, shown):
    monkeypatch.setattr(sys, "stderr", stream())
    monkeypatch.setattr(console.DatasetCatalog, "get", lambda name: [{}] * 4)
    evaluators = DatasetEvaluators([console.ProgressBar("mine")])
    evaluators.reset()
    evaluators.process([{}, {}], [{}, {}])
    evaluators.evaluate()
    assert ("Evaluating mine" in sys.stderr.getvalue()) == shown
    record = logging.LogRecord(
        "detectron2.evaluation.evaluator", logging.INFO, "", 0, "Inference done 2/4.", (), None
    )
    assert console.Summary().filter(record) != shown  # the bar replaces this line


@pytest.mark.parametrize(("kind", "expected"), [(UserError, False), (ValueError, True)])
def test_a_traceback_is_printed_unless_the_message_is_enough(kind, expected):
    try:
        raise kind("wrong")
    except kind:
        record = logging.LogRecord("x", logging.ERROR, "", 0, "", (), sys.exc_info())
    assert console.Summary().filter(record) == expected
