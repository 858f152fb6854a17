"""Errors that a user can fix, and their messages."""

import difflib
import os
import re
from collections.abc import Sequence

LONGEST = 490  # characters of a message
_LONGEST_WORD = 200  # characters of a path or value in it
_HIDDEN = "***"
# a URL that went through pathlib has one slash; after the colon there may be a port
_URL = r"([a-z][\w+.-]+:/{1,2}"
_PORT = r"(?!\d+(?:[/\s,;)'\"?]|$))"
_URL_SECRETS = (
    (re.compile(rf"{_URL}[^\s:/@]*):{_PORT}\S*@", re.I), r"\1:***@"),  # holds "@", "/" and quotes
    (re.compile(rf"{_URL}[^\s:/@]*):{_PORT}[^\n@]*@", re.I), r"\1:***@"),  # or blanks
    (re.compile(rf"{_URL})[^\s/@:]+@", re.I), r"\1***@"),  # a token alone
)
_NAMED_SECRET = re.compile(
    r"\b([\w-]*(?:password|passwd|secret|token|api[_-]?key))=[^\s&;'\"]+", re.IGNORECASE
)
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # a terminal would execute them
_SECRET_VARIABLE = re.compile(r"PASSWORD|PASSWD|SECRET|TOKEN|API_?KEY", re.IGNORECASE)


class UserError(ValueError):
    """One line: what is wrong, which value, and how to fix it. The CLI exits with code 2."""


class Changed(UserError):
    """The folder has a result of the same stage with other options or inputs."""

    def __init__(self, message: str, difference: str) -> None:
        super().__init__(message)
        self.difference = difference


class NotFinite(UserError):
    """A loss or figure is NaN or infinite."""


def nearest(name: str, known: Sequence[str]) -> str:
    """The end of a message about an unknown name: the most similar known one, or all."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(known)}"


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its class where there is none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return shortened(masked(lines[0])) if lines else type(error).__name__


def shortened(text: str, *, word: int = _LONGEST_WORD, most: int = LONGEST) -> str:
    """One line, with "..." for the middle of long words and of the whole."""
    return _without_middle(" ".join(_without_middle(part, word) for part in text.split()), most)


def masked(text: str) -> str:
    """Without control characters and secrets: of URLs, `password=` etc., and the environment."""
    text = _CONTROLS.sub("?", text)
    for pattern, hidden in _URL_SECRETS:
        text = pattern.sub(hidden, text)
    text = _NAMED_SECRET.sub(rf"\1={_HIDDEN}", text)
    for name, value in os.environ.items():
        if _SECRET_VARIABLE.search(name) and len(value) >= 8:
            text = text.replace(value, _HIDDEN)
    return text


def is_masked(text: str) -> bool:
    """Whether a secret was removed from `text`."""
    return _HIDDEN in text


def _without_middle(text: str, most: int) -> str:
    if len(text) <= most:
        return text
    end = most // 3
    return f"{text[: most - end - 3]}...{text[-end:]}"
