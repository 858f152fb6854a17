"""Running stages: one small file per process, for `prunedm monitor` and parent processes.

Each process updates its own (watching.py). Writing is best effort: a full disk or a read-only home
never fails a stage.
"""

import os
import signal
import socket
import time
from contextlib import suppress
from pathlib import Path

import psutil
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from prunedm.errors import UserError
from prunedm.reading import read_text

STATE = "PRUNEDM_STATE"
FINISHED_LINES = 50
_FORGET = 86_400.0  # seconds without news after which a process on another host is dropped
_SAME_START = 2.0  # seconds of tolerance, since the clock may be adjusted meanwhile


class Entry(BaseModel):
    """One process that runs stages; times are seconds since 1970."""

    model_config = ConfigDict(ser_json_inf_nan="constants")

    pid: int
    process_started: float
    host: str
    command: str
    cwd: str
    out: Path  # absolute
    stage: str = ""
    about: str = ""  # details such as a run's settings in a sweep
    log: Path | None = None
    started: float
    updated: float
    label: str = ""  # of the current task
    done: int = 0
    total: int = 0
    task_started: float = 0.0
    rate: float | None = None  # recent units per second
    note: str = ""
    figures: dict[str, tuple[int, float]] = Field({}, description="of the task: last step, value")
    held_out: list[tuple[int, float]] = Field([], description="of the task: step, held-out loss")
    lines: list[str] = Field([], description="the last messages")

    @property
    def name(self) -> str:
        return self.out.name or str(self.out)

    @property
    def here(self) -> bool:
        return self.host == socket.gethostname()

    def process(self) -> psutil.Process | None:
        """The process, if it is on this host, still the same one, and not a zombie."""
        if not self.here:
            return None
        try:
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.process_started) < _SAME_START
            return process if same and process.status() != psutil.STATUS_ZOMBIE else None
        except psutil.Error:
            return None


class Finished(BaseModel):
    """A stage that ended: its loss, or in `error` why it failed."""

    model_config = ConfigDict(ser_json_inf_nan="constants")

    out: Path
    stage: str
    when: float
    seconds: float
    loss: float | None = None
    error: str = ""


def state_folder() -> Path:
    """The folder of the entries, which need not exist."""
    if os.environ.get(STATE):
        return Path(os.environ[STATE])
    with suppress(RuntimeError):
        return Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser() / "prunedm"
    return Path(os.devnull) / "prunedm"  # no home: writing there fails silently


def entries() -> list[Entry]:
    """All running processes, oldest first; deletes files of ended processes on this host."""
    found = []
    for path in sorted((state_folder() / "running").glob("*.json")):
        entry = _read(path)
        if entry is None:
            continue
        if entry.here and entry.process() is None:
            with suppress(OSError):
                path.unlink()
        elif entry.here or time.time() - entry.updated < _FORGET:
            found.append(entry)
    return sorted(found, key=lambda entry: entry.started)


def entry_of(pid: int) -> Entry | None:
    """The entry of a process on this host; None where it has none."""
    entry = _read(entry_file(socket.gethostname(), pid))
    return entry if entry is not None and entry.process() is not None else None


def stop(entry: Entry) -> None:
    """Interrupt this process alone, as Ctrl-C does; running its command again resumes the stage.

    Raises `UserError` where the process is on another host, another user's, or gone.
    """
    if not entry.here:
        raise UserError(f"{entry.name} runs on {entry.host}: run the command there")
    process = entry.process()
    if process is None:
        raise UserError(f"{entry.name} (pid {entry.pid}) has ended already")
    try:
        process.send_signal(signal.SIGINT)
    except psutil.NoSuchProcess:
        raise UserError(f"{entry.name} (pid {entry.pid}) has ended already") from None
    except psutil.AccessDenied:
        raise UserError(
            f"pid {entry.pid} is of another user, who has to stop {entry.name}"
        ) from None


def finished() -> list[Finished]:
    """Recently ended stages, the latest first."""
    try:
        lines = _finished_file().read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return []
    found = []
    for line in lines[-FINISHED_LINES:]:
        with suppress(ValidationError):
            found.append(Finished.model_validate_json(line))
    return found[::-1]


def entry_file(host: str, pid: int) -> Path:
    return state_folder() / "running" / f"{host}-{pid}.json"


def write_entry(entry: Entry) -> None:
    """Write the entry atomically, through a temporary file."""
    path = entry_file(entry.host, entry.pid)
    aside = path.with_name(f"{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(entry.model_dump_json(), encoding="utf-8")
        aside.replace(path)
    except (OSError, ValueError):  # ValueError: names that are not UTF-8
        with suppress(OSError):
            aside.unlink(missing_ok=True)


def remove_entry(entry: Entry) -> None:
    path = entry_file(entry.host, entry.pid)
    with suppress(OSError):
        path.unlink(missing_ok=True)


def add_finished(end: Finished) -> None:
    """Append to the list, and shorten it once it has twice the kept lines."""
    path = _finished_file()
    with suppress(OSError, ValueError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(end.model_dump_json() + "\n")
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        if len(lines) >= 2 * FINISHED_LINES:
            aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
            aside.write_text("".join(lines[-FINISHED_LINES:]), encoding="utf-8")
            aside.replace(path)


def _finished_file() -> Path:
    return state_folder() / "finished.jsonl"


def _read(path: Path) -> Entry | None:
    """None where the file has vanished or is of another version."""
    try:
        return Entry.model_validate_json(read_text(path))
    except (OSError, ValidationError, UserError):
        return None
