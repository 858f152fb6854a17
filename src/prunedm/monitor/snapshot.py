"""All that one look finds: the machine, what runs, what finished lately."""

import time

from pydantic import BaseModel

from prunedm.monitor.machine import Machine, Meter, Use
from prunedm.system.running import Entry, Finished, entries, finished

SHOWN_FINISHED = 5
FIRST_LOOK = 0.3  # seconds over which the first CPU shares are taken


class Run(BaseModel):
    """A running process, and what it uses; times are in seconds."""

    entry: Entry
    use: Use | None  # of this host's
    elapsed: float
    silent: float  # since it last wrote its entry
    remaining: float | None  # of the current bar


class Snapshot(BaseModel):
    """One look."""

    now: float
    machine: Machine
    runs: list[Run]
    finished: list[Finished]


def look(meter: Meter, now: float | None = None) -> Snapshot:
    """The state of things; take two looks with a meter before its CPU shares mean something."""
    now = time.time() if now is None else now
    return Snapshot(
        now=now,
        machine=meter.machine(),
        runs=[_run(entry, meter, now) for entry in entries()],
        finished=finished()[:SHOWN_FINISHED],
    )


def first_look(meter: Meter) -> Snapshot:
    """One look with CPU shares of the moment before it."""
    look(meter)
    time.sleep(FIRST_LOOK)
    return look(meter)


def _run(entry: Entry, meter: Meter, now: float) -> Run:
    silent = max(0.0, now - entry.updated)
    left = (entry.total - entry.done) / entry.rate if entry.rate else None
    return Run(
        entry=entry,
        use=meter.use(entry),
        elapsed=max(0.0, now - entry.started),
        silent=silent,
        remaining=None if left is None else max(0.0, left - silent),
    )
