"""How long work tells that it moves, without knowing about terminals."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Bar(Protocol):
    """One bar: `advance` by finished units, with the latest figure beside it."""

    def advance(self, units: int = 1, note: str = "") -> None: ...

    def figures(self, values: Mapping[str, float], step: int) -> None:
        """Figures after `step` steps, by name; an `advance` follows."""


class Progress(Protocol):
    """Where bars are shown; `say` prints one line between them."""

    def task(self, label: str, total: int, done: int = 0) -> AbstractContextManager[Bar]: ...

    def say(self, text: str) -> None: ...


class _SilentBar:
    def advance(self, units: int = 1, note: str = "") -> None:
        pass

    def figures(self, values: Mapping[str, float], step: int) -> None:
        pass


class Silent:
    """The default of every library function: no output at all."""

    @contextmanager
    def task(self, label: str, total: int, done: int = 0) -> Iterator[Bar]:
        yield _SilentBar()

    def say(self, text: str) -> None:
        pass
