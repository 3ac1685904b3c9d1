"""Errors that the user can mend, and what the command line makes of them."""

import re
import traceback


class UserError(Exception):
    """Something in the config, the files or the command is wrong; the message is one line."""


class UnsafeFileError(UserError):
    """Reading the file may run code from it."""


def one_line(error: BaseException) -> str:
    """The message of an error on one line, also of one that crossed a process boundary."""
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
    """Whether the message tells the user what to mend.

    That is so for a ``UserError``, for what the system says about files and loading processes, and
    for values that solo_d2 or Detectron2 refuse. All else keeps its traceback, also such an error
    on whose way there is code of a user's plug-in: it may be the plug-in that is wrong.
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
