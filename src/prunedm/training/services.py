"""What a tracking service needs beyond accelerate's tracker of the same name."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prunedm.errors import UserError
from prunedm.options import LoopOptions


@dataclass(frozen=True)
class Histogram:
    """Counts (B,) between neighbouring edges (B + 1,)."""

    counts: np.ndarray
    edges: np.ndarray

    @classmethod
    def of(cls, values: torch.Tensor, bins: int = 64) -> "Histogram":
        """Finite values, in bins of equal width from the smallest to the largest."""
        low, high = float(values.min()), float(values.max())
        if low == high:
            low, high = low - 0.5, high + 0.5
        counts = torch.histc(values.float(), bins, low, high)
        return cls(counts.cpu().numpy(), np.linspace(low, high, bins + 1))

    @property
    def centres(self) -> np.ndarray:
        """The middle of each bin, (B,)."""
        middles: np.ndarray = (self.edges[:-1] + self.edges[1:]) / 2
        return middles


class Service:
    """A tracking service; the defaults suit one whose package draws images and histograms.

    name: its name as an option, in accelerate, and of its package. can_be_offline: whether
    `mode="offline"` starts it without a network. To add one: a module in `trackers/`, and a line in
    `tables.TRACKERS`.
    """

    name = "none"
    can_be_offline = False

    def needs(self, options: LoopOptions) -> dict[tuple[str, ...], str]:
        """Packages, of which one must be installed -> the error where none is."""
        return {(self.name,): f"tracker = {self.name!r} is not installed: pip install {self.name}"}

    def check_usable(self, options: LoopOptions) -> None:
        """Raise `UserError` where a package is missing, or accelerate does not know the service."""
        for packages, message in self.needs(options).items():
            if not any(map(find_spec, packages)):
                raise UserError(message)
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        if self.name not in LOGGER_TYPE_TO_CLASS:
            raise UserError(
                f"tracker = {self.name!r} needs a newer accelerate: pip install -U accelerate"
            )

    def settings(
        self, options: LoopOptions, *, folder: Path, run: str, done: int
    ) -> dict[str, Any]:
        """Arguments of the service's `init` for run `run`, continued after `done` steps.

        Local files go into `folder`, unless the service has one place for all runs.
        """
        raise NotImplementedError

    def start(self, options: LoopOptions, settings: dict[str, Any]) -> Any:
        """The running tracker. Raises whatever the service raises, also instead of asking for a key."""
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        with _nobody_to_ask():
            tracker = LOGGER_TYPE_TO_CLASS[self.name](options.tracker_project, **settings)
            if hasattr(tracker, "start"):  # older versions of accelerate start at once
                tracker.start()
        return tracker

    def log_image(self, tracker: Any, tag: str, image_HWC: np.ndarray, step: int) -> None:
        """Log a picture, uint8 RGB."""
        tracker.log_images({tag: [image_HWC]}, step=step)

    def log_histogram(self, tracker: Any, tag: str, histogram: Histogram, step: int) -> None:
        """Log a distribution; does nothing where the installed version cannot draw one."""
        package = import_module(self.name)
        if hasattr(package, "Histogram"):
            bins = package.Histogram(np_histogram=(histogram.counts, histogram.edges))
            tracker.log({tag: bins}, step=step)

    def finish(self, tracker: Any) -> None:
        """End the run."""
        tracker.finish()


NONE = Service()  # no tracker is started


def title_of(folder: Path) -> str:
    """The run's title: the name of the stage's folder."""
    return folder.name.removesuffix(".partial") or folder.parent.name


@contextmanager
def _nobody_to_ask() -> Iterator[None]:
    """Hide the terminal from services, which would wait there for an account."""
    terminal = sys.stdin
    with Path(os.devnull).open(encoding="utf-8") as nothing:
        sys.stdin = nothing
        try:
            yield
        finally:
            sys.stdin = terminal
