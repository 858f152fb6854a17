"""Where a stage works until its result is whole, and how that takes its place; no kill loses either.

Beside the result, in `<out>.partial`, which is renamed to `<out>`; or within `<out>`, in `.partial`,
from which all is moved up: where the folder is there and empty, is the current one, or cannot be
renamed (a mount, a parent that is not ours). In both, `identity.json` says whose the work is; it is
whole as soon as `whole.json`, the record to be, is there, and only tidied up from then on.
"""

import os
import shutil
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunedm.errors import UserError
from prunedm.places import PARTIAL, target
from prunedm.reading import read_object
from prunedm.record import (
    FILE,
    Record,
    comparable,
    read_record_file,
    write_json,
    write_record,
)

RESUME = "resume"  # in there: what an interrupted stage goes on from
WHOLE = "whole.json"
IDENTITY = "identity.json"
CLOCK = "clock.json"  # when this session began, and the seconds of those before it
_REPLACED = ".prunedm-replaced"  # what was in `out`, until it is removed
_FILLING = ".prunedm-filling"  # a whole result that is being moved up from within `out`


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
        own = {PARTIAL, _REPLACED, _FILLING}
        return any(path.name not in own for path in self.out.iterdir())

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
        if not self.is_resumable():
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
        self._restore()
        remove(self.partial)
        (self.partial / RESUME).mkdir(parents=True)
        write_json(identity, self.partial / IDENTITY)

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
        write_json({"spent": spent, "began": time.time()}, clock)
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
        remove(self.out.with_name(self.out.name + _REPLACED))
        remove(self.out / _REPLACED)
        remove(self._filling)
        if self.is_within and not self.is_resumable():
            remove(self.partial)

    def give_up(self) -> None:
        """After a failure: keep what can be gone on from, and nothing else."""
        if not self.is_resumable() and not (self.partial / WHOLE).exists():
            remove(self.partial)

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
        own = {self.partial.name, self.replaced.name}
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
    return not folder.is_mount() and os.access(folder.parent, os.W_OK | os.X_OK)
