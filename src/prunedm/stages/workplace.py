"""The working folder of a stage, and how its result takes its place; a kill loses neither.

Work happens next to the result, in `<out>.partial`, which is renamed to `<out>`; or within `<out>`, in
`.partial`, whose content is moved up: where the folder exists and is empty, is the current one, or
cannot be renamed (a mount, a parent that is not ours). In both, `identity.json` names the result in
the making. Once `whole.json`, the record to be, exists, the result is whole and only tidied up. Other
content is not ours and is never touched. One process at a time works on a result: it holds
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

RESUME = "resume"  # in the working folder: the state from which an interrupted stage continues
WHOLE = "whole.json"
IDENTITY = "identity.json"
CLOCK = "clock.json"  # start and process of this session, and seconds of earlier sessions
_REPLACED = ".prunedm-replaced"  # former content of `out`, until it is removed
_FILLING = ".prunedm-filling"  # a whole result being moved up within `out`
_DROPPED = ".prunedm-dropped"  # a working folder being removed
_LOCK = ".prunedm-lock"
_FILE = ".prunedm-partial"


@dataclass(frozen=True)
class Workplace:
    """out: place of the result, links resolved. partial: the working folder."""

    out: Path
    partial: Path
    replaced: Path

    @classmethod
    def of(cls, out: str | Path) -> "Workplace":
        """Raises `UserError` for an impossible name."""
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
        """Whether `out` holds anything but our own working files."""
        if not self.out.is_dir():
            return self.out.exists()
        own = {PARTIAL, _REPLACED, _FILLING, _DROPPED, _LOCK}
        return any(path.name not in own for path in self.out.iterdir())

    @property
    def _lock(self) -> Path:
        """Next to `out`, or within it where the parent is not writable or another file system."""
        within = self.out.is_dir() and (self.out.is_mount() or not _is_writable(self.out.parent))
        return self.out / _LOCK if within else self.out.with_name(self.out.name + _LOCK)

    @property
    def file(self) -> Path:
        """Temporary path for a result that is one file."""
        return self.out.with_name(self.out.name + _FILE)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Lock the result; raises `UserError` where another command is making it."""
        self._lock.parent.mkdir(parents=True, exist_ok=True)
        try:
            with locked(self._lock):
                yield
        except Timeout:
            raise UserError(
                f"{self.out} is being made by {self._maker()}; wait for it, or give another folder"
            ) from None

    def _maker(self) -> str:
        """The process that is making the result, by its clock file."""
        with suppress(UserError, KeyError, TypeError, ValueError):
            clock = read_object(self.partial / CLOCK)
            there = "" if clock["host"] == socket.gethostname() else f" on {clock['host']}"
            return f"process {int(clock['pid'])}{there}"
        return "another process"

    def whole(self) -> Record | None:
        """The record of a whole result that has yet to take its place, or None."""
        if self.is_within and self._filling.exists():
            return self._record(self._filling / FILE)
        record = self._record(self.partial / WHOLE)
        if record is not None or (self.partial / IDENTITY).exists():
            return record
        return self._record(self.partial / FILE)  # complete except for the rename

    def _record(self, path: Path) -> Record | None:
        return read_record_file(path, self.out, f"delete {path.parent} to start again")

    def is_resumable(self) -> bool:
        return any(path.is_file() for path in (self.partial / RESUME).rglob("*"))

    def unfinished(self) -> dict[str, Any] | None:
        """Identity of the unfinished run in the working folder, or None."""
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
        """Make a new working folder."""
        self._check_ours()
        self._restore()
        self._drop()
        (self.partial / RESUME).mkdir(parents=True)
        write_json(identity, self.partial / IDENTITY)

    def _is_ours(self) -> bool:
        """Whether the working folder is ours: it is marked, or still empty."""
        if self.partial.is_symlink() or not self.partial.is_dir():
            return False
        marked = any((self.partial / name).is_file() for name in (IDENTITY, WHOLE, FILE))
        begun = f"{IDENTITY}.tmp"
        return marked or all(p.is_dir() or p.name == begun for p in self.partial.rglob("*"))

    def _check_ours(self) -> None:
        if os.path.lexists(self.partial) and not self._is_ours():
            raise UserError(
                f"{self.partial} is in the way and was not made by prunedm; move it, or give "
                "another folder"
            )

    def _drop(self) -> None:
        """Remove the working folder; renamed first, so that a half-removed one is never resumed."""
        dropped = self.partial.with_name(self.out.name * (not self.is_within) + _DROPPED)
        remove(dropped)
        if self._is_ours():
            self.partial.rename(dropped)
            remove(dropped)

    def spent(self) -> float:
        """Seconds of earlier sessions; starts the clock of this one.

        A killed session counts until its last write to `resume`. An unreadable clock counts as zero.
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
        """Mark the result as whole: it is never made again."""
        write_record(record, self.partial, WHOLE)

    def finish(self) -> None:
        """Tidy up and put the whole result into its place. Can be resumed after a kill at any step."""
        if not (self.is_within and self._filling.exists()):
            for name in (RESUME, IDENTITY, CLOCK):
                remove(self.partial / name)
            if (self.partial / WHOLE).exists():
                (self.partial / WHOLE).replace(self.partial / FILE)
            if self.is_within:
                self._empty()
            elif self.out.exists():
                remove(self.replaced)
                self.out.rename(self.replaced)
        if self.is_within:
            self._fill()
        else:
            self.partial.rename(self.out)
        remove(self.replaced)

    def tidy(self) -> None:
        """Remove leftovers of a kill next to or within a finished result."""
        names = (_REPLACED, _DROPPED)
        left = [self.out.with_name(self.out.name + name) for name in names]
        left += [self.out / name for name in (*names, _FILLING)]
        if self.is_within and not self.is_resumable() and self._is_ours():
            left.append(self.partial)
        if any(os.path.lexists(path) for path in (*left, self._lock)):
            with suppress(UserError), self.held():  # another process at work tidies up itself
                for path in left:
                    remove(path)

    def give_up(self) -> None:
        """After a failure: remove the working folder unless it can be resumed."""
        if not self.is_resumable() and not (self.partial / WHOLE).exists():
            self._drop()

    def _restore(self) -> None:
        """Undo or complete an interrupted exchange whose result is not wanted any more."""
        if self.is_within and self._filling.exists():
            self._fill()
        elif self.is_within and self.replaced.exists() and not (self.out / FILE).exists():
            for path in reversed(_record_first(self.replaced)):
                path.rename(self.out / path.name)
        elif not self.out.exists() and self.replaced.exists():
            self.replaced.rename(self.out)
        remove(self.replaced)

    def _empty(self) -> None:
        """Move the old content away, its record first, so that the rest is not taken for a result."""
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
    """Remove a file, a folder, or a link (not its target)."""
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
