"""Errors that users can fix, and how the command line reports them."""

import re
import traceback


class UserError(Exception):
    """Something in the config, the files or the command is wrong; the message is one line."""


class UnsafeFileError(UserError):
    """Reading the file may run code from it."""


def one_line(error: BaseException) -> str:
    """The message of an error on one line, even if the error crossed a process boundary."""
    # KeyError puts its message in quotes.
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    if "Traceback (most recent call last):" in text:
        # A data loading worker's error has its whole traceback in the message.
        return re.sub(r"^[\w.]*(Error|Exception): ", "", lines[-1])
    return " ".join(lines)


# Packages whose own code raises these errors for a wrong config, file or data set.
_CHECKED: dict[str, tuple[type[Exception], ...]] = {
    "solo_d2": (ValueError,),
    "detectron2": (ValueError, KeyError),
    "fvcore": (ValueError, KeyError),
}


def is_user_error(error: BaseException) -> bool:
    """Whether the message alone is enough for the user to fix the error.

    This is true for a ``UserError``, for system errors about files and data loading processes, and
    for values that solo_d2 or Detectron2 reject. Other errors keep their traceback. So does an
    error that passed through a user's plug-in, because the plug-in may be wrong.
    """
    if isinstance(error, (UserError, OSError)):
        return True
    if isinstance(error, RuntimeError):
        return str(error).startswith("DataLoader worker (pid") or isinstance(
            error.__context__, OSError
        )
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    modules = [frame.f_globals.get("__name__", "").partition(".")[0] for frame in frames]
    if not set(modules) <= {*_CHECKED, "__main__", "torch"}:
        return False
    return isinstance(error, _CHECKED.get(modules[-1] if modules else "", ()))
