"""How long work reports progress, independent of terminals."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Bar(Protocol):
    """One progress bar."""

    def advance(self, units: int = 1, note: str = "") -> None:
        """Count finished units, with the latest figure as a note."""

    def figures(self, values: Mapping[str, float], step: int) -> None:
        """Figures after `step` steps, by name; an `advance` follows."""


class Progress(Protocol):
    """Shows bars; `say` prints one line between them."""

    def task(self, label: str, total: int, done: int = 0) -> AbstractContextManager[Bar]: ...

    def say(self, text: str) -> None: ...


class SilentBar:
    """A bar that is not shown."""

    def advance(self, units: int = 1, note: str = "") -> None:
        pass

    def figures(self, values: Mapping[str, float], step: int) -> None:
        pass


class Silent:
    """The default of every library function: no output."""

    @contextmanager
    def task(self, label: str, total: int, done: int = 0) -> Iterator[Bar]:
        yield SilentBar()

    def say(self, text: str) -> None:
        pass
