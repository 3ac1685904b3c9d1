"""The cache folder for generated files: embedded data sets and repaired annotations."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from iopath.common.file_io import file_lock


def cache_folder() -> Path:
    """$SOLO_D2_CACHE, or ~/.cache/solo_d2."""
    return Path(os.environ.get("SOLO_D2_CACHE") or "~/.cache/solo_d2").expanduser()


def ensure_folder(name: str, fill: Callable[[Path], None]) -> Path:
    """The folder ``name`` of the cache, filled by ``fill(folder)`` if it does not exist yet.

    It is filled under another name and then renamed, so it is never incomplete. Processes that need
    it at the same time take turns, and all but the first find it ready.
    """
    root = cache_folder()
    folder = root / name
    if folder.is_dir():  # also when the cache is read-only
        return folder
    # The kernel releases the lock of a killed process. So the holder is alone, and any unfinished
    # folder was left by a process that died.
    with file_lock(str(root / "writing")):
        for leftover in root.glob("unfinished-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        if not folder.is_dir():
            unfinished = Path(tempfile.mkdtemp(prefix="unfinished-", dir=root))
            try:
                unfinished.chmod(0o755)  # mkdtemp's folder is private; caches get shared
                fill(unfinished)
                unfinished.rename(folder)
            except BaseException:
                shutil.rmtree(unfinished, ignore_errors=True)
                raise
    return folder
