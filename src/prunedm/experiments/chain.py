"""One run of a sweep, in its own process: every missing stage, then the figures.

python -m prunedm.experiments.chain OUT RUN
"""

import os
import shlex
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import psutil
from filelock import Timeout

from prunedm.errors import Changed, UserError, first_line, masked
from prunedm.experiments.store import Run, Status, Store, recipe_of
from prunedm.experiments.workers import BUSY, PATIENCE, SCHEDULER
from prunedm.folder import load
from prunedm.messages import one_line
from prunedm.options import EvaluateOptions
from prunedm.progress import Progress
from prunedm.recipe import Step, steps_of
from prunedm.stages.evaluating.measure import RESULTS, measure, read_evaluation
from prunedm.stages.verbs.compare import yardstick
from prunedm.system.watching import Watched

FAILED, INTERRUPTED = 2, 130
_LOOK_EVERY = 0.5  # seconds


def run_chain(store: Store, run: Run, progress: Progress) -> None:
    """Make the missing parts of a run, waiting for stages that another run is making."""
    recipe = recipe_of(run)
    measured = partial(figures, options=recipe.evaluation(), progress=progress)
    current: str | Path = recipe.model
    works: list[tuple[str, str, Callable[[Path], None]]] = [
        ("dense", run.dense, partial(measured, current, label="dense"))
    ]
    for step, place in zip(steps_of(recipe), run.stages, strict=True):
        works.append((step.label, place.folder, partial(_make, step, current, progress=progress)))
        if step.stage.makes == "model":
            current = store.stage(place.folder)
    works.append(("evaluate", run.evaluation, partial(measured, current, label=run.label)))
    status = Status(state="running", host=socket.gethostname(), pid=os.getpid())
    status.started = time.time()
    for name, folder, work in works:
        status.stage, status.stage_started = name, time.time()
        store.set_status(run.id, status)
        _alone(store, folder, progress, partial(work, store.stage(folder)))
    status.state, status.seconds = "done", time.time() - status.started
    store.set_status(run.id, status)


def _make(step: Step, source: str | Path, out: Path, *, progress: Progress) -> None:
    progress.say(f"{step.label}: {step.make(source, out, progress=progress)}")


def figures(
    source: str | Path, out: Path, *, options: EvaluateOptions, label: str, progress: Progress
) -> None:
    """Quality, size and sparsity of one model; no latencies, which parallel runs would disturb.

    Raises `UserError` where a step has failed; it is measured again the next time.
    """
    model = load(source)
    yard = yardstick(model, options, progress)
    again = (out / RESULTS).exists() and bool(read_evaluation(out).failed)
    try:
        measure(model, out, label, yard, overwrite=again)
    except Changed:
        measure(model, out, label, yard, overwrite=True)
    for step, error in read_evaluation(out).failed.items():
        raise UserError(f"evaluation of {label}: {step}: {error}")


def _alone(store: Store, folder: str, progress: Progress, make: Callable[[], None]) -> None:
    """Call `make` once no other run is making the same stage."""
    waits = False
    while True:
        try:
            with store.stage_lock(folder):
                make()
                return
        except Timeout:
            if not waits:
                progress.say(f"waiting for {folder}, which another run is making")
            waits = True
            time.sleep(_LOOK_EVERY)


def main(out: str, run_id: str) -> int:
    """Run one run; returns the exit code. Errors go to the run's status and the log."""
    from prunedm.console import Terminal
    from prunedm.system.signals import interruptible

    store = Store(Path(out))
    _end_with_scheduler()
    try:
        with store.lock(run_id), interruptible():
            run = store.read(run_id)
            folder = store.folder(run_id)
            try:
                with Watched(
                    Terminal(), folder, command=_command(out), stage="sweep", about=run.label
                ) as progress:
                    run_chain(store, run, progress)
            except KeyboardInterrupt:
                return _end(store, run_id, "stopped", "", INTERRUPTED)
            except Exception as error:
                message = one_line(error)
                print(message or masked(traceback.format_exc()), file=sys.stderr)
                reason = message or f"{type(error).__name__}: {first_line(error)}"
                return _end(store, run_id, "failed", reason, FAILED)
    except Timeout:
        return BUSY
    return 0


def _end(store: Store, run: str, state: str, error: str, code: int) -> int:
    status = store.status(run)
    seconds = time.time() - status.started if status.started else 0.0
    store.set_status(
        run, status.model_copy(update={"state": state, "error": error, "seconds": seconds})
    )
    return code


def _command(out: str) -> str:
    """The command that continues the sweep, as the scheduler was started."""
    with suppress(psutil.Error):
        words = psutil.Process(os.getppid()).cmdline()
        if "sweep" in words:
            return shlex.join(["prunedm", *words[words.index("sweep") :]])
    return f"prunedm sweep FILE.yaml {out}"


def _end_with_scheduler() -> None:
    """Interrupt this process when its scheduler is gone, even by kill -9."""
    scheduler = int(os.environ.get(SCHEDULER, os.getppid()))

    def watch() -> None:
        while os.getppid() == scheduler:
            time.sleep(_LOOK_EVERY)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(PATIENCE)
        os._exit(INTERRUPTED)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
