"""Live curves, pictures and distributions in the tracking service that the user chose.

Without a network the tracker works offline; when it fails, training continues without it.
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
from prunedm.tables import TRACKERS
from prunedm.training.services import NONE, Histogram, Service

QUANTILES = (5, 25, 50, 75, 95)  # percent


@dataclass(frozen=True)
class Shown:
    """Things made only for trackers, by name; images are uint8 HWC, RGB."""

    figures: Mapping[str, float] = field(default_factory=dict)
    histograms: Mapping[str, Histogram] = field(default_factory=dict)
    images: Mapping[str, np.ndarray] = field(default_factory=dict)


def distribution(name: str, values: torch.Tensor) -> Shown:
    """Quantiles of finite values, which every service draws as curves, and a histogram."""
    values = values.detach().flatten()
    count = len(values)
    ranks = {percent: max(1, -(-percent * count // 100)) for percent in QUANTILES}
    figures = {f"{name}_q{p:02d}": float(values.kthvalue(rank)[0]) for p, rank in ranks.items()}
    return Shown(figures, {name: Histogram.of(values)})


def new_run() -> str:
    """An identifier that every service accepts: 21 lower-case letters and digits."""
    return uuid.uuid4().hex[:21]


class Tracking:
    """Sends a run's figures to its tracker, if any, until the tracker fails."""

    def __init__(self, service: Service, tracker: Any, progress: Progress) -> None:
        self._service, self._tracker, self._progress = service, tracker, progress
        self._shows = True

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Figures after `step` steps."""
        self._try(lambda tracker: tracker.log(dict(figures), step=step))

    def show(self, make: Callable[[], Shown], step: int) -> None:
        """Show what `make` returns. It is called only for a tracker, and never again once it failed."""
        if self._tracker is None or not self._shows:
            return
        try:
            shown = make()
        except Exception as error:  # no memory, images that are not finite: training continues
            self._shows = False
            self._progress.say(f"{self._service.name}: no more pictures ({first_line(error)})")
            return
        if shown.figures:
            self.log(shown.figures, step)
        for tag, histogram in shown.histograms.items():
            self._try(partial(self._service.log_histogram, tag=tag, histogram=histogram, step=step))
        for tag, image_HWC in shown.images.items():
            self._try(partial(self._service.log_image, tag=tag, image_HWC=image_HWC, step=step))

    def begin(self, options: Mapping[str, Any]) -> None:
        """Store the run's options, once per run."""
        kept = {k: v for k, v in options.items() if isinstance(v, (bool, int, float, str))}
        self._try(lambda tracker: tracker.store_init_configuration(kept))

    def finish(self) -> None:
        self._try(self._service.finish)

    def _try(self, act: Callable[[Any], object]) -> None:
        if self._tracker is None:
            return
        try:
            act(self._tracker)
        except Exception as error:  # whatever a service raises, hours of training matter more
            self._tracker = None
            self._progress.say(
                f"{self._service.name} failed ({first_line(error)}): no longer tracked"
            )


@contextmanager
def tracked(
    options: LoopOptions, folder: Path, run: str, done: int, progress: Progress, *, here: bool
) -> Iterator[Tracking]:
    """The options' tracker, finished at the end; `run` is continued if the service knows it.

    folder: the stage's, which names the run and holds local files. done: steps before now. here:
    whether this process tracks. Raises `UserError` where the tracker's package is not installed.
    """
    service: Service = TRACKERS[options.tracker]
    tracker = None
    if service is not NONE and here:
        service.check_usable(options)
        settings = service.settings(options, folder=folder, run=run, done=done)
        tracker = _open(service, options, settings, progress)
    tracking = Tracking(service, tracker, progress)
    try:
        if done == 0:
            tracking.begin(options.model_dump())
        yield tracking
    finally:
        tracking.finish()


def _open(
    service: Service, options: LoopOptions, settings: dict[str, Any], progress: Progress
) -> Any:
    """The tracker, offline where the service cannot be reached; None where that fails too."""
    try:
        return service.start(options, settings)
    except Exception as error:  # no network, no account, no answer
        reason = first_line(error)
    if service.can_be_offline and "mode" not in settings:
        try:
            tracker = service.start(options, settings | {"mode": "offline"})
            progress.say(f"{service.name}: offline ({reason})")
            return tracker
        except Exception as error:
            reason = first_line(error)
    progress.say(f"{service.name}: {reason}; training continues untracked")
    return None
