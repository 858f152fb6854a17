"""A progress that keeps its process's entry (running.py) up to date."""

import atexit
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from prunedm.errors import first_line, masked
from prunedm.progress import Bar, Progress
from prunedm.system.running import Entry, Finished, add_finished, remove_entry, write_entry

LOG = "PRUNEDM_LOG"  # path of the log to which the parent process sends the output
HELD_OUT = "held_out_loss"
WRITE_EVERY = 1.0  # seconds
SAID_LINES = 5
_RATE_OVER = 30  # writes
_OF_TASK = ("label", "done", "total", "task_started", "rate", "note", "figures", "held_out")


class Watched:
    """Forwards to the wrapped progress and writes the entry of this process.

    out: the folder of the result. command: the command that starts it again. about: details. As a
    context manager it also records how the work ended. Unless `registered`, it only forwards.
    """

    def __init__(
        self,
        progress: Progress,
        out: Path,
        *,
        command: str,
        stage: str = "",
        about: str = "",
        registered: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        now, log = time.time(), os.environ.get(LOG)
        self.entry = Entry(
            pid=os.getpid(),
            process_started=psutil.Process().create_time(),
            host=socket.gethostname(),
            command=masked(command),
            cwd=_folder(),
            out=out.absolute(),
            stage=stage,
            about=masked(about),
            log=Path(log).absolute() if log else None,
            started=now,
            updated=now,
        )
        self._progress, self._clock, self._registered = progress, clock, registered
        self._begun = self._written = clock()
        self._recent: deque[tuple[float, int]] = deque(maxlen=_RATE_OVER)  # (seconds, done)
        self._depth = 0  # of nested tasks
        self._loss: float | None = None
        self._tells_end = True
        atexit.register(self.close)
        self._write()

    @contextmanager
    def task(self, label: str, total: int, done: int = 0) -> Iterator[Bar]:
        outer, recent = {name: getattr(self.entry, name) for name in _OF_TASK}, self._recent
        with self._progress.task(label, total, done) as bar:
            self._set(label=label, total=total, done=done, note="", rate=None)
            self._set(task_started=time.time(), figures={}, held_out=[])
            self._recent = deque(maxlen=_RATE_OVER)
            self._write()
            self._depth += 1
            try:
                yield _WatchedTask(bar, self)
            finally:
                self._depth -= 1
                self._write()
                if self._depth:
                    self._set(**outer)
                    self._recent = recent

    def say(self, text: str) -> None:
        text = masked(text)
        self._progress.say(text)
        self.entry.lines = [*self.entry.lines, text][-SAID_LINES:]
        self._write_if_due()

    def advance(self, units: int, note: str) -> None:
        """Count finished units of the current task."""
        entry = self.entry
        entry.done += units
        entry.note = masked(note) or entry.note
        if self._recent:
            seconds = self._clock() - self._recent[0][0]
            entry.rate = (entry.done - self._recent[0][1]) / seconds if seconds > 0 else None
        self._write_if_due()

    def figures(self, values: Mapping[str, float], step: int) -> None:
        """Keep the latest figures; the next `advance` writes them."""
        self.entry.figures |= {name: (step, float(value)) for name, value in values.items()}
        if HELD_OUT in values:
            self.entry.held_out.append((step, float(values[HELD_OUT])))

    def result(self, figures: Mapping[str, Any], *, made: bool = True) -> None:
        """Figures for the list of finished stages; not listed unless `made` now."""
        self._loss, self._tells_end = figures.get("loss"), made

    def close(self) -> None:
        """Remove the entry, except in forked workers, which have none."""
        atexit.unregister(self.close)
        if self._registered and os.getpid() == self.entry.pid:
            remove_entry(self.entry)
        self._registered = False

    def __enter__(self) -> "Watched":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if self._registered and (error is not None or self._tells_end):
            add_finished(
                Finished(
                    out=self.entry.out,
                    stage=self.entry.stage,
                    when=time.time(),
                    seconds=self._clock() - self._begun,
                    loss=self._loss,
                    error=_reason(error),
                )
            )
        self.close()

    def _set(self, **values: Any) -> None:
        for name, value in values.items():
            setattr(self.entry, name, value)

    def _write_if_due(self) -> None:
        if self._clock() - self._written >= WRITE_EVERY:
            self._write()

    def _write(self) -> None:
        self._written, self.entry.updated = self._clock(), time.time()
        self._recent.append((self._written, self.entry.done))
        if self._registered:
            write_entry(self.entry)


class _WatchedTask:
    def __init__(self, bar: Bar, watched: Watched) -> None:
        self._bar, self._watched = bar, watched

    def advance(self, units: int = 1, note: str = "") -> None:
        self._bar.advance(units, note)
        self._watched.advance(units, note)

    def figures(self, values: Mapping[str, float], step: int) -> None:
        self._bar.figures(values, step)
        self._watched.figures(values, step)


def _folder() -> str:
    try:
        return str(Path.cwd())
    except OSError:  # it was deleted
        return ""


def _reason(error: BaseException | None) -> str:
    if error is None:
        return ""
    return "stopped" if isinstance(error, KeyboardInterrupt) else first_line(error)
