"""Work in a process of its own: its memory can be measured, and its output goes to a file."""

import multiprocessing
import os
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

_POLL_SECONDS = 1.0


def in_process(
    function: Callable[..., Any],
    *args: Any,
    log: Path,
    progress: Callable[[], None] = lambda: None,
) -> Any:
    """Call a function of this package in a new process; returns or raises what it does.

    Args:
        function, args: picklable.
        log: file that its standard output and error are appended to.
        progress: called about once a second meanwhile.
    """
    forkserver = "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if forkserver else "spawn")
    if forkserver:
        # It imports once and is small: a fork of this process would begin with its memory.
        context.set_forkserver_preload(["solo_d2.tools.compare.measure"])
    arguments = log, os.environ.copy()
    with ProcessPoolExecutor(1, context, initializer=_start, initargs=arguments) as pool:
        result = pool.submit(function, *args)
        while not wait([result], timeout=_POLL_SECONDS).done:
            progress()
        return result.result()


def _start(log: Path, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    log.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()  # a comparison that is killed takes this process along
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
