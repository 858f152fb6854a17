"""One run by its name: find it, stop it, show its log."""

import time
from collections.abc import Sequence
from pathlib import Path

from prunedm.errors import UserError
from prunedm.system.running import Entry, stop

STOP_WITHIN = 30.0  # seconds
LOG_LINES = 40
_TAIL = 65_536  # bytes of a log file that are read


def find_run(name: str, running: Sequence[Entry]) -> Entry:
    """The run with this folder, folder name or pid. Raises `UserError` unless there is exactly one."""
    if not running:
        raise UserError(f"nothing is running, so there is no {name!r}")
    path = Path(name).absolute()
    for found in (
        [e for e in running if e.out == path],
        [e for e in running if e.out.name == name],
        [e for e in running if str(e.pid) == name],
    ):
        if len(found) == 1:
            return found[0]
        if found:
            raise UserError(f"{len(found)} runs match {name!r}; give the pid: {_listed(found)}")
    raise UserError(f"no run {name!r}; running: {_listed(running)}")


def _listed(running: Sequence[Entry]) -> str:
    return ", ".join(f"{e.out} ({e.pid}{'' if e.here else f' on {e.host}'})" for e in running)


def stop_and_wait(entry: Entry, seconds: float = STOP_WITHIN) -> bool:
    """Interrupt the run, and return whether it ended within `seconds`."""
    stop(entry)
    deadline = time.monotonic() + seconds
    while entry.process() is not None:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def how_to_go_on(entry: Entry) -> str:
    """The command that continues a stopped run, with the folder to give it in."""
    elsewhere = entry.cwd and Path(entry.cwd) != Path.cwd()
    return f"in {entry.cwd}: {entry.command}" if elsewhere else entry.command


def said(entry: Entry) -> list[str]:
    """The last lines of the run's log file, or its last messages if it has none."""
    if entry.log is None:
        return entry.lines
    try:
        with entry.log.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - _TAIL))
            text = file.read().decode("utf-8", "replace")
    except OSError as error:
        raise UserError(f"cannot read the log {entry.log}: {error.strerror}") from error
    return ["".join(c for c in line if c.isprintable()) for line in text.splitlines()[-LOG_LINES:]]
