"""What can go wrong, by who can mend it. Every message is one line: what was given, what was expected, what to do."""

import difflib
import re
from pathlib import Path


class UserError(ValueError):
    """A mistake that the user can mend. Its text is one line: what was given, what was expected, what to do."""


class OtherProcessFailed(RuntimeError):
    """Another process failed at what this one was waiting for, and says why."""


class NonFiniteLoss(RuntimeError):
    """The loss is infinite or not a number: the run stops, its last checkpoint stays."""


class Stopped(RuntimeError):
    """A signal ended the run after its current step, and it was saved; `number` is the signal's."""

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.number = number


def printable(text: str) -> str:
    """A text as one line that every terminal can show: control characters, and bytes that are no UTF-8, as escapes."""

    def shown(c: str) -> str:
        if "\udc80" <= c <= "\udcff":  # how Python carries a byte of a file name that it cannot decode
            return f"\\x{ord(c) - 0xDC00:02x}"
        return c if c.isprintable() else c.encode("unicode_escape").decode()

    return "".join(map(shown, text))


def reason_of(error: Exception, most: int = 200) -> str:
    """What an error says, in one line of at most so many letters; its type where it says nothing."""
    return " ".join(str(error).split())[:most] or type(error).__name__


def what_is_left(checkpoint: Path) -> str:
    kept = f"the last good checkpoint is {checkpoint}" if checkpoint.exists() else "no checkpoint was written"
    return f"{kept}; start anew with a lower --base-lr or --amp off"


def nearest(given: str, choices) -> str:
    """The choice that is meant by a word: one that begins with it or has it as a part, or is spelt like it; else ""."""
    word, names = given.lower(), list(choices)
    close = [name for name in names if word and (name.startswith(word) or word in re.split("[_-]", name))]
    return next(iter(close + difflib.get_close_matches(word, names, n=1)), "")


def unknown(kind: str, given: str, choices) -> str:
    """The message for a name that does not exist, with the nearest one that does."""
    hint = f"did you mean {close!r}? " if (close := nearest(given, choices)) else ""
    return f"unknown {kind} {given!r}; {hint}choose from {', '.join(choices)}"
