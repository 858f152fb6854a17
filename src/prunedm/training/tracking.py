"""Live curves in TensorBoard, Weights & Biases, Trackio or SwanLab, through accelerate's trackers.

A tracker is a guest: without a network it works offline, and when it fails the training goes on.
"""

import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from prunedm.errors import UserError
from prunedm.options import LoopOptions
from prunedm.progress import Progress

OFFLINE = ("wandb", "swanlab")  # the others never need a network


def new_run() -> str:
    """An identifier that every service takes: 21 lower-case letters and digits."""
    return uuid.uuid4().hex[:21]


class Tracking:
    """Where a run's figures go; silent without a tracker, and after its first failure."""

    def __init__(self, tracker: Any, progress: Progress) -> None:
        self._tracker, self._progress = tracker, progress

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Figures after `step` steps."""
        self._try("log", dict(figures), step=step)

    def begin(self, options: Mapping[str, Any]) -> None:
        """What the run is made with; once a run."""
        kept = {k: v for k, v in options.items() if isinstance(v, (bool, int, float, str))}
        self._try("store_init_configuration", kept)

    def finish(self) -> None:
        self._try("finish")

    def _try(self, method: str, *arguments: Any, **named: Any) -> None:
        if self._tracker is None:
            return
        try:
            getattr(self._tracker, method)(*arguments, **named)
        except Exception as error:  # whatever a service raises, hours of training matter more
            name, self._tracker = type(self._tracker).__name__, None
            self._progress.say(f"{name} failed ({_first_line(error)}): no longer tracked")


@contextmanager
def tracked(
    options: LoopOptions, *, folder: Path, run: str, progress: Progress
) -> Iterator[Tracking]:
    """The options' tracker, finished at the end; `run` is continued if the service knows it.

    folder: the stage's; its name is the run's, and local files lie in it. Raises `UserError` where
    the tracker's package is not installed.
    """
    tracker = None
    if options.tracker != "none":
        check_installed(options.tracker)
        tracker = _open(options, folder, run, progress)
    tracking = Tracking(tracker, progress)
    try:
        yield tracking
    finally:
        tracking.finish()


def check_installed(name: str) -> None:
    packages = ("tensorboard", "tensorboardX") if name == "tensorboard" else (name,)
    if not any(find_spec(package) for package in packages):
        raise UserError(f"tracker = {name!r} is not installed: pip install {name}")


def _open(options: LoopOptions, folder: Path, run: str, progress: Progress) -> Any:
    settings = _settings(options.tracker, folder, run)
    try:
        return _start(options, settings)
    except Exception as error:  # no network, no account, no answer
        reason = _first_line(error)
    if options.tracker in OFFLINE:
        try:
            tracker = _start(options, settings | {"mode": "offline"})
            progress.say(f"{options.tracker}: offline ({reason})")
            return tracker
        except Exception as error:
            reason = _first_line(error)
    progress.say(f"{options.tracker}: {reason}; training goes on untracked")
    return None


def _settings(name: str, folder: Path, run: str) -> dict[str, Any]:
    """Arguments of the service's own `init`."""
    title = folder.name.removesuffix(".partial")
    if name == "tensorboard":
        return {"logging_dir": folder / "tensorboard"}
    if name == "wandb":
        return {"id": run, "name": title, "resume": "allow", "dir": str(folder)}
    if name == "swanlab":
        return {"id": run, "resume": "allow"}
    return {"name": f"{title}-{run[:6]}", "resume": "allow"}  # trackio knows runs by name


def _start(options: LoopOptions, settings: dict[str, Any]) -> Any:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    tracker = LOGGER_TYPE_TO_CLASS[options.tracker](options.tracker_project, **settings)
    if hasattr(tracker, "start"):  # older versions of accelerate start at once
        tracker.start()
    return tracker


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
