"""Errors that a user can mend, and how they name the way out."""

import difflib
from collections.abc import Sequence


class UserError(ValueError):
    """Says in one line what is wrong, which value, and the way out. The CLI exits with code 2."""


class Changed(UserError):
    """The folder holds what the same stage made of other options or inputs."""

    def __init__(self, message: str, difference: str) -> None:
        super().__init__(message)
        self.difference = difference


class NotDone(Exception):
    """A stage that was only looked at is not done: why."""


def nearest(name: str, known: Sequence[str]) -> str:
    """The end of a message about an unknown name: the one that was meant, or all there are."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(known)}"


def first_line(error: BaseException) -> str:
    """What an error says first, or its class where it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
