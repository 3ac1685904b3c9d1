"""Errors that the user can mend, and what the command line makes of them."""

import re


class UserError(Exception):
    """Something in the config, the files or the command is wrong; the message is one line."""


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
