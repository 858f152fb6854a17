"""Work in forked children: torch is imported once, and a child has its own limits and its own end."""

import gc
import json
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

SECONDS = 20.0
MEMORY = 1 << 30  # bytes more than the server has
_LOOK_EVERY = 0.01
_SHARED: list[Any] = []  # work and tasks of `in_parallel`
_PAGE = resource.getpagesize()
_IMPORTS = (
    "datasets",
    "diffusers",
    "onnxruntime",
    "PIL.Image",
    "sklearn.datasets",
    "scipy.linalg",
    "prunedm.cli",
    "prunedm.console",
    "prunedm.experiments.chain",
    "prunedm.experiments.sweep",
    "prunedm.stages",
)
EXPORTS = (
    "onnx", "onnxscript", "openvino", "torch._inductor.decomposition",
    "torch.onnx._internal.exporter._core",
)  # fmt: skip


@dataclass
class Ended:
    """How a child ended. code: of its exit, negative for a signal. limit: the one it broke."""

    code: int
    seconds: float
    growth: int  # bytes of memory at its peak, beyond the server's
    out: str
    err: str
    limit: str = ""  # "hung" or "heavy"
    connections: list[str] = field(default_factory=list)  # that it tried to make
    answer: Any = None  # of the work


def prepare(home: Path, more: Sequence[str] = ()) -> None:
    """Import all that children need, with one thread; none of it may reach the network or a home."""
    os.environ |= {
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(home / "hf"),
        "HOME": str(home),
        "PRUNEDM_STATE": str(home / "state"),
        "NO_COLOR": "1",
        "COLUMNS": "100",
        "CUDA_VISIBLE_DEVICES": "",
    }
    for name in (*_IMPORTS, *more):
        import_module(name)
    import torch

    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # or the children's collectors would copy every page


def prunedm(command: Sequence[str]) -> None:
    """The command line, in this process; returns where it succeeds."""
    from prunedm.cli import main

    sys.argv = ["prunedm", *command]
    try:
        main(list(command))
    except SystemExit as end:
        if end.code not in (0, None):
            raise


def in_child(
    work: Callable[[], Any], folder: Path, *, seconds: float = SECONDS, memory: int = MEMORY
) -> Ended:
    """Call `work` in a forked child whose current folder is `folder`, and wait for its end."""
    notes = folder.with_name(folder.name + ".notes")
    notes.mkdir(parents=True, exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        _live(work, folder, notes, seconds)
    own, limit = _memory(os.getpid()), ""
    while True:
        pid, status, usage = os.wait4(child, os.WNOHANG)
        if pid:
            break
        over = time.monotonic() - began > seconds
        if over or _memory(child) - own > memory:
            limit = limit or ("hung" if over else "heavy")
            os.killpg(child, signal.SIGKILL)
        time.sleep(_LOOK_EVERY)
    growth = max(0, usage.ru_maxrss * 1024 - own)
    ended = Ended(
        code=os.waitstatus_to_exitcode(status),
        seconds=time.monotonic() - began,
        growth=growth,
        out=_text(notes / "out"),
        err=_text(notes / "err"),
        limit=limit or ("heavy" if growth > memory else ""),
        connections=_text(notes / "connections").splitlines(),
        answer=json.loads(_text(notes / "answer") or "null"),
    )
    shutil.rmtree(notes)
    return ended


def in_parallel(work: Callable[[Any], Any], tasks: Sequence[Any], jobs: int) -> Iterator[Any]:
    """`work` on every task, by `jobs` processes; results in the order they come."""
    if jobs == 1:
        yield from map(work, tasks)
        return
    _SHARED[:] = work, tasks  # forked along: neither need be picklable
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        yield from pool.imap_unordered(_shared_task, range(len(tasks)))


def _shared_task(number: int) -> Any:
    work, tasks = _SHARED
    return work(tasks[number])


def _live(work: Callable[[], Any], folder: Path, notes: Path, seconds: float) -> None:
    """The child's life, which ends here."""
    os.setpgid(0, 0)
    limit = int(seconds) + 10  # where nobody watches any more
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(notes / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(folder)
    sys.addaudithook(partial(_guard, notes / "connections"))
    code = 1
    try:
        answer = work()
        (notes / "answer").write_text(json.dumps(answer), encoding="utf-8")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)


def _guard(notes: Path, event: str, arguments: tuple[Any, ...]) -> None:
    """No connection but to this machine; the names that are asked for count as such."""
    if event == "socket.connect":
        address = arguments[1]
        host = address[0] if isinstance(address, tuple) else "localhost"
    elif event == "socket.getaddrinfo":
        host = arguments[0]
    else:
        return
    if str(host) not in ("127.0.0.1", "::1", "localhost", "None"):
        with notes.open("a", encoding="utf-8") as file:
            file.write(f"{host}\n")
        raise ConnectionRefusedError(f"no network in this test: {host}")


def _memory(pid: int) -> int:
    """Bytes in memory; 0 of a process that is gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE
    except (OSError, IndexError):
        return 0


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(1 << 20).decode("utf-8", "replace")
    except OSError:
        return ""
