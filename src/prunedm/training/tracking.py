"""Live curves, pictures and distributions in a tracking service that the user has asked for.

A tracker is a guest: without a network it works offline, and when it fails the training goes on.
"""

import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prunedm.errors import first_line
from prunedm.options import LoopOptions
from prunedm.progress import Progress
from prunedm.training.services import (
    OFFLINE,
    Histogram,
    check_usable,
    finish,
    log_histogram,
    log_image,
    settings_for,
    start,
)

QUANTILES = (5, 25, 50, 75, 95)  # percent


@dataclass(frozen=True)
class Shown:
    """What is made for trackers only, by name; images are uint8 HWC, RGB."""

    figures: Mapping[str, float] = field(default_factory=dict)
    histograms: Mapping[str, Histogram] = field(default_factory=dict)
    images: Mapping[str, np.ndarray] = field(default_factory=dict)


def distribution(name: str, values: torch.Tensor) -> Shown:
    """Quantiles of finite values, which every service draws as curves, and their histogram."""
    values = values.detach().flatten()
    count = len(values)
    ranks = {percent: max(1, -(-percent * count // 100)) for percent in QUANTILES}
    figures = {f"{name}_q{p:02d}": float(values.kthvalue(rank)[0]) for p, rank in ranks.items()}
    return Shown(figures, {name: Histogram.of(values)})


def new_run() -> str:
    """An identifier that every service takes: 21 lower-case letters and digits."""
    return uuid.uuid4().hex[:21]


class Tracking:
    """Where a run's figures go; silent without a tracker, and after its first failure."""

    def __init__(self, name: str, tracker: Any, progress: Progress) -> None:
        self._name, self._tracker, self._progress = name, tracker, progress
        self._shows = True

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Figures after `step` steps."""
        self._try(lambda tracker: tracker.log(dict(figures), step=step))

    def show(self, make: Callable[[], Shown], step: int) -> None:
        """What `make` gives, which is called only where there is a tracker; never after it failed."""
        if self._tracker is None or not self._shows:
            return
        try:
            shown = make()
        except Exception as error:  # no memory, images that are not finite: training goes on
            self._shows = False
            self._progress.say(f"{self._name}: no more pictures ({first_line(error)})")
            return
        if shown.figures:
            self.log(shown.figures, step)
        for tag, histogram in shown.histograms.items():
            self._try(partial(log_histogram, self._name, tag, histogram, step))
        for tag, image_HWC in shown.images.items():
            self._try(partial(log_image, self._name, tag, image_HWC, step))

    def begin(self, options: Mapping[str, Any]) -> None:
        """What the run is made with; once a run."""
        kept = {k: v for k, v in options.items() if isinstance(v, (bool, int, float, str))}
        self._try(lambda tracker: tracker.store_init_configuration(kept))

    def finish(self) -> None:
        self._try(partial(finish, self._name))

    def _try(self, act: Callable[[Any], object]) -> None:
        if self._tracker is None:
            return
        try:
            act(self._tracker)
        except Exception as error:  # whatever a service raises, hours of training matter more
            self._tracker = None
            self._progress.say(f"{self._name} failed ({first_line(error)}): no longer tracked")


@contextmanager
def tracked(
    options: LoopOptions, folder: Path, run: str, done: int, progress: Progress, *, here: bool
) -> Iterator[Tracking]:
    """The options' tracker, finished at the end; `run` is continued if the service knows it.

    folder: the stage's; its name is the run's, and local files lie in it. done: steps before now.
    here: whether this is the process that tracks. Raises `UserError` where the tracker's package is
    not installed.
    """
    tracker = None
    if options.tracker != "none" and here:
        check_usable(options)
        tracker = _open(options, settings_for(options, folder=folder, run=run, done=done), progress)
    tracking = Tracking(options.tracker, tracker, progress)
    try:
        if done == 0:
            tracking.begin(options.model_dump())
        yield tracking
    finally:
        tracking.finish()


def _open(options: LoopOptions, settings: dict[str, Any], progress: Progress) -> Any:
    """The tracker, offline where it cannot be reached, None where that fails too."""
    name = options.tracker
    try:
        return start(options, settings)
    except Exception as error:  # no network, no account, no answer
        reason = first_line(error)
    if name in OFFLINE and "mode" not in settings:
        try:
            tracker = start(options, settings | {"mode": "offline"})
            progress.say(f"{name}: offline ({reason})")
            return tracker
        except Exception as error:
            reason = first_line(error)
    progress.say(f"{name}: {reason}; training goes on untracked")
    return None
