"""Where a stage works until its result is whole, and how that takes its place; no kill loses either.

Beside the result, in `<out>.partial`, which is renamed to `<out>`; or within `<out>`, in `.partial`,
from which all is moved up: where the folder is there and empty, is the current one, or cannot be
renamed (a mount, a parent that is not ours). In both, `identity.json` says whose the work is; it is
whole as soon as `whole.json`, the record to be, is there, and only tidied up from then on. What does
not look like that is not ours, and never touched. One process at a time works for a result: it holds
`<out>.prunedm-lock`.
"""

import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunedm.errors import UserError
from prunedm.reading import read_object
from prunedm.record import (
    FILE,
    Record,
    comparable,
    read_record_file,
    write_json,
    write_record,
)
from prunedm.system.locks import Timeout, locked
from prunedm.system.places import PARTIAL, target

RESUME = "resume"  # in there: what an interrupted stage goes on from
WHOLE = "whole.json"
IDENTITY = "identity.json"
CLOCK = "clock.json"  # when this session began, whose it is, and the seconds of those before it
_REPLACED = ".prunedm-replaced"  # what was in `out`, until it is removed
_FILLING = ".prunedm-filling"  # a whole result that is being moved up from within `out`
_DROPPED = ".prunedm-dropped"  # a working folder that is being removed
_LOCK = ".prunedm-lock"
_FILE = ".prunedm-partial"  # nobody's but ours


@dataclass(frozen=True)
class Workplace:
    """out: where the result will lie, links followed. partial: the working folder."""

    out: Path
    partial: Path
    replaced: Path

    @classmethod
    def of(cls, out: str | Path) -> "Workplace":
        """Raises `UserError` where nothing can be called that."""
        out = target(out)
        within = cls(out, out / PARTIAL, out / _REPLACED)
        beside = cls(out, out.with_name(out.name + PARTIAL), out.with_name(out.name + _REPLACED))
        if within.partial.exists() or within._filling.exists():
            return within
        if not out.is_dir() or (beside.partial.exists() and _can_be_renamed(out)):
            return beside
        return beside if within.has_content() and _can_be_renamed(out) else within

    @property
    def is_within(self) -> bool:
        return self.partial.parent == self.out

    @property
    def _filling(self) -> Path:
        return self.out / _FILLING

    def has_content(self) -> bool:
        """Whether something lies in `out` that is not our own work on it."""
        if not self.out.is_dir():
            return self.out.exists()
        own = {PARTIAL, _REPLACED, _FILLING, _DROPPED, _LOCK}
        return any(path.name not in own for path in self.out.iterdir())

    @property
    def _lock(self) -> Path:
        """Beside `out`, or within it where nothing can be beside or that is another file system."""
        within = self.out.is_dir() and (self.out.is_mount() or not _is_writable(self.out.parent))
        return self.out / _LOCK if within else self.out.with_name(self.out.name + _LOCK)

    @property
    def file(self) -> Path:
        """Where a result that is one file is written until it is whole."""
        return self.out.with_name(self.out.name + _FILE)

    @contextmanager
    def held(self) -> Iterator[None]:
        """No other command makes this result while the context lasts.

        Raises `UserError` where one does.
        """
        self._lock.parent.mkdir(parents=True, exist_ok=True)
        try:
            with locked(self._lock):
                yield
        except Timeout:
            raise UserError(
                f"{self.out} is being made by {self._maker()}; wait for it, or give another folder"
            ) from None

    def _maker(self) -> str:
        """The process whose session the clock is of."""
        with suppress(UserError, KeyError, TypeError, ValueError):
            clock = read_object(self.partial / CLOCK)
            there = "" if clock["host"] == socket.gethostname() else f" on {clock['host']}"
            return f"process {int(clock['pid'])}{there}"
        return "another process"

    def whole(self) -> Record | None:
        """The record of a whole result that only has to take its place."""
        if self.is_within and self._filling.exists():
            return self._record(self._filling / FILE)
        record = self._record(self.partial / WHOLE)
        if record is not None or (self.partial / IDENTITY).exists():
            return record
        return self._record(self.partial / FILE)  # all but renamed

    def _record(self, path: Path) -> Record | None:
        return read_record_file(path, self.out, f"delete {path.parent} to start again")

    def is_resumable(self) -> bool:
        return any(path.is_file() for path in (self.partial / RESUME).rglob("*"))

    def unfinished(self) -> dict[str, Any] | None:
        """The identity of what waits in the working folder to be gone on with."""
        whole = self.whole()
        if whole is not None:
            return whole.identity
        if not self.is_resumable() or not self._is_ours():
            return None
        path = self.partial / IDENTITY
        try:
            found = read_object(path)
            return comparable({key: dict(found[key]) if key != "stage" else found[key]
                               for key in ("stage", "options", "inputs")})  # fmt: skip
        except (UserError, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{path} is damaged ({error}); delete {self.partial} to start again"
            ) from error

    def begin(self, identity: dict[str, Any]) -> None:
        """A new working folder."""
        self._check_ours()
        self._restore()
        self._drop()
        (self.partial / RESUME).mkdir(parents=True)
        write_json(identity, self.partial / IDENTITY)

    def _is_ours(self) -> bool:
        """Whether a working folder is one of ours: it says so, or is still to say so."""
        if self.partial.is_symlink() or not self.partial.is_dir():
            return False
        marked = any((self.partial / name).is_file() for name in (IDENTITY, WHOLE, FILE))
        begun = f"{IDENTITY}.tmp"
        return marked or all(p.is_dir() or p.name == begun for p in self.partial.rglob("*"))

    def _check_ours(self) -> None:
        if os.path.lexists(self.partial) and not self._is_ours():
            raise UserError(
                f"{self.partial} is in the way, and not of prunedm's making; move it, or give "
                "another folder"
            )

    def _drop(self) -> None:
        """Remove the working folder; half of one that was killed at this is never gone on with."""
        dropped = self.partial.with_name(self.out.name * (not self.is_within) + _DROPPED)
        remove(dropped)
        if self._is_ours():
            self.partial.rename(dropped)
            remove(dropped)

    def spent(self) -> float:
        """Seconds of the sessions before this one, which begins now.

        A session that was killed lasted until it last wrote what can be gone on with. A clock that
        cannot be read counts nothing.
        """
        clock, spent = self.partial / CLOCK, 0.0
        with suppress(UserError, KeyError, TypeError, ValueError):
            earlier = read_object(clock)
            files = (self.partial / RESUME).rglob("*")
            last = max((path.stat().st_mtime for path in files), default=0.0)
            spent = float(earlier["spent"]) + max(0.0, last - float(earlier["began"]))
        session = {"began": time.time(), "host": socket.gethostname(), "pid": os.getpid()}
        write_json({"spent": spent} | session, clock)
        return spent

    def set_whole(self, record: Record) -> None:
        """From here on the result is never made again."""
        write_record(record, self.partial, WHOLE)

    def finish(self) -> None:
        """Tidy up, and put the whole result into its place. A kill at any step is gone on from."""
        if not (self.is_within and self._filling.exists()):
            for name in (RESUME, IDENTITY, CLOCK):
                remove(self.partial / name)
            if (self.partial / WHOLE).exists():
                (self.partial / WHOLE).replace(self.partial / FILE)
            (self._empty if self.is_within else self._set_aside)()
        if self.is_within:
            self._fill()
        else:
            self.partial.rename(self.out)
        remove(self.replaced)

    def tidy(self) -> None:
        """Remove what a kill has left beside or within a finished result."""
        names = (_REPLACED, _DROPPED)
        left = [self.out.with_name(self.out.name + name) for name in names]
        left += [self.out / name for name in (*names, _FILLING)]
        if self.is_within and not self.is_resumable() and self._is_ours():
            left.append(self.partial)
        if any(os.path.lexists(path) for path in (*left, self._lock)):
            with suppress(UserError), self.held():  # whoever is at it tidies up himself
                for path in left:
                    remove(path)

    def give_up(self) -> None:
        """After a failure: keep what can be gone on from, and nothing else."""
        if not self.is_resumable() and not (self.partial / WHOLE).exists():
            self._drop()

    def _restore(self) -> None:
        """Undo or end an exchange that was cut off, and is not to be gone on with."""
        if self.is_within and self._filling.exists():
            self._fill()
        elif self.is_within and self.replaced.exists() and not (self.out / FILE).exists():
            for path in reversed(_record_first(self.replaced)):
                path.rename(self.out / path.name)
        elif not self.out.exists() and self.replaced.exists():
            self.replaced.rename(self.out)
        remove(self.replaced)

    def _set_aside(self) -> None:
        if self.out.exists():
            remove(self.replaced)
            self.out.rename(self.replaced)

    def _empty(self) -> None:
        """Move the old content away, its record first: then nobody takes the rest for a result."""
        self.replaced.mkdir(exist_ok=True)
        own = {self.partial.name, self.replaced.name, _DROPPED, _LOCK}
        for path in _record_first(self.out):
            if path.name not in own:
                remove(self.replaced / path.name)
                path.rename(self.replaced / path.name)
        self.partial.rename(self._filling)

    def _fill(self) -> None:
        for path in reversed(_record_first(self._filling)):
            path.rename(self.out / path.name)
        self._filling.rmdir()


def remove(path: Path) -> None:
    """Whatever it is; of a link, the link."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def _record_first(folder: Path) -> list[Path]:
    return sorted(folder.iterdir(), key=lambda path: (path.name != FILE, path.name))


def _can_be_renamed(folder: Path) -> bool:
    with suppress(OSError):
        if Path.cwd().is_relative_to(folder):
            return False
    return not folder.is_mount() and _is_writable(folder.parent)


def _is_writable(folder: Path) -> bool:
    return os.access(folder, os.W_OK | os.X_OK)
