"""The one kind of error a user can mend, and how it names the way out."""

import difflib
from collections.abc import Sequence


class UserError(ValueError):
    """Says in one line what is wrong, which value, and the way out. The CLI exits with code 2."""


def nearest(name: str, known: Sequence[str]) -> str:
    """The end of a message about an unknown name: the one that was meant, or all there are."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(known)}"


def first_line(error: BaseException) -> str:
    """What an error says first, or its class where it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
