"""Runs as child processes, each with its own GPU or its share of the processor."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from prunedm.errors import UserError
from prunedm.experiments.store import Run, Status, Store
from prunedm.system.running import Entry, entry_of
from prunedm.system.watching import LOG

SCHEDULER = "PRUNEDM_SWEEP"  # who started the child, by process number
BUSY = 75  # exit code of a child whose run belongs to another process
_HOW_TO_END = {"done": (0,), "stopped": (130, 143), "failed": (2,), "pruned": (130, 143)}
PATIENCE = 60.0  # seconds from asking a child to end to killing it


@dataclass(frozen=True)
class Slot:
    """Resources of one run at a time: a GPU, or a number of threads."""

    number: int
    gpu: str = ""  # of CUDA_VISIBLE_DEVICES; "" is none of its own
    threads: int = 1

    @property
    def environment(self) -> dict[str, str]:
        gpu = {"CUDA_VISIBLE_DEVICES": self.gpu} if self.gpu else {}
        return {"OMP_NUM_THREADS": str(self.threads), "PYTHONUNBUFFERED": "1"} | gpu


def slots(workers: int, threads: int, gpus: Sequence[str]) -> list[Slot]:
    """`workers` slots; 0: one per GPU, or one on a machine without.

    threads: of each; 0 divides the cores evenly. Raises `UserError` for more workers than GPUs, if
    there are any, or than cores.
    """
    for name, number in (("workers", workers), ("threads", threads)):
        if number < 0:
            raise UserError(f"{name} = {number}: give at least 1, or 0 for as many as there are")
    cores = os.cpu_count() or 1
    count = workers or max(1, len(gpus))
    if gpus and count > len(gpus):
        raise UserError(f"workers = {count}: there are {len(gpus)} GPUs; give at most that many")
    if count * max(1, threads) > cores and (threads or not gpus):
        raise UserError(
            f"{count} workers with {max(1, threads)} threads: there are {cores} cores; give fewer"
        )
    share = threads or max(1, cores // count)
    return [Slot(k, gpus[k] if gpus else "", share) for k in range(count)]


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    known = [name.strip() for name in named.split(",")] if named else list(map(str, range(count)))
    return known[:count]


@dataclass
class Worker:
    """A run made by a child process of this one."""

    run: Run
    slot: Slot
    process: "subprocess.Popen[bytes]"
    ended_early: bool = False  # by a pruner

    @property
    def entry(self) -> Entry | None:
        """Its own entry among the running processes."""
        return entry_of(self.process.pid)

    def interrupt(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)


def start(store: Store, run: Run, slot: Slot) -> Worker:
    """A child process that makes `run`; what it prints is added to the run's log."""
    store.write(run)
    store.set_status(run.id, Status())  # clears the status of an earlier session
    log = store.log(run.id)
    command = [sys.executable, "-m", "prunedm.experiments.chain", str(store.out), run.id]
    with log.open("ab") as file:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=os.environ | slot.environment | {LOG: str(log), SCHEDULER: str(os.getpid())},
            start_new_session=True,  # Ctrl-C reaches it only through us
        )
    return Worker(run, slot, process)


def outcome(store: Store, job: Worker) -> Status:
    """The final status of an ended job: its own, or how its process ended."""
    status, code = store.status(job.run.id), job.process.returncode
    if job.ended_early:
        if status.state != "done":  # before the signal came
            status = status.model_copy(update={"state": "pruned", "error": ""})
    elif status.state in ("running", "waiting") or code not in _HOW_TO_END[status.state]:
        status = status.model_copy(update={"state": "failed", "error": _how_it_ended(code)})
    store.set_status(job.run.id, status)
    return status


def _how_it_ended(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    hint = " (out of memory?)" if -code == signal.SIGKILL else ""
    return f"killed by {signal.Signals(-code).name}{hint}"


def end_all(jobs: Sequence[Worker]) -> None:
    """Interrupt the jobs and wait; a later sweep continues them."""
    for job in jobs:
        job.interrupt()
    deadline = time.monotonic() + PATIENCE
    for job in jobs:
        try:
            job.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            job.process.kill()
            job.process.wait()


def log_tail(path: Path, lines: int = 12) -> str:
    """The last lines of a log; "" where there is none."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return "\n".join(text.splitlines()[-lines:])
