"""TensorBoard, Weights & Biases, Trackio and SwanLab: what each wants beside accelerate's trackers."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prunedm.errors import UserError
from prunedm.options import LoopOptions

OFFLINE = ("wandb", "swanlab")  # the others never need a network
# seconds that wandb waits for its server: 90, and at the end for ever, where nobody says otherwise
_PATIENCE = {"init_timeout": 30.0, "finish_timeout": 600.0}


@dataclass(frozen=True)
class Histogram:
    """Numbers of values between neighbouring edges: B counts, B + 1 edges."""

    counts: np.ndarray
    edges: np.ndarray

    @classmethod
    def of(cls, values: torch.Tensor, bins: int = 64) -> "Histogram":
        """Of finite values, in bins of equal width from the smallest to the largest."""
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


def check_usable(options: LoopOptions) -> None:
    """Raise `UserError` where the tracker's package is missing, or accelerate does not know it."""
    name = options.tracker
    packages = ("tensorboard", "tensorboardX") if name == "tensorboard" else (name,)
    if not any(find_spec(package) for package in packages):
        raise UserError(f"tracker = {name!r} is not installed: pip install {name}")
    if name == "swanlab" and options.tracker_mode == "local" and not find_spec("swanboard"):
        raise UserError(
            "tracker_mode = 'local' needs SwanLab's dashboard: pip install 'swanlab[dashboard]'"
        )
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    if name not in LOGGER_TYPE_TO_CLASS:
        raise UserError(f"tracker = {name!r} needs a newer accelerate: pip install -U accelerate")


def settings_for(options: LoopOptions, *, folder: Path, run: str, done: int) -> dict[str, Any]:
    """Arguments of the service's own `init`: of run `run`, continued after `done` steps.

    Files on this machine lie in `folder`, but for Trackio's, which has one place for all runs.
    """
    name, title = options.tracker, folder.name.removesuffix(".partial") or folder.parent.name
    if name == "tensorboard":
        # hides what an interrupted run wrote after its last checkpoint: it is written again
        return {"logging_dir": folder / "tensorboard", "purge_step": done + 1 if done else 0}
    if name == "trackio":  # which knows runs by name
        return {"name": f"{title}-{run[:6]}", "resume": "allow"}
    mode = {} if options.tracker_mode == "auto" else {"mode": options.tracker_mode}
    if name == "wandb":
        mode = {"mode": "offline"} if mode else {}
        return {"id": run, "name": title, "resume": "allow", "dir": str(folder)} | mode
    place = {"experiment_name": title, "logdir": str(folder / "swanlab")}
    return {"id": run, "resume": "allow"} | place | mode


def start(options: LoopOptions, settings: dict[str, Any]) -> Any:
    """The running tracker. Raises whatever the service raises, also where it would ask for a key."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    settings = settings | _limits(options.tracker)
    with _nobody_to_ask():
        tracker = LOGGER_TYPE_TO_CLASS[options.tracker](options.tracker_project, **settings)
        if hasattr(tracker, "start"):  # older versions of accelerate start at once
            tracker.start()
    return tracker


def _limits(name: str) -> dict[str, Any]:
    """wandb's patience, as far as this version knows of it and the environment says nothing."""
    if name != "wandb":
        return {}
    import wandb

    known = getattr(wandb.Settings, "__annotations__", {})
    limits = {
        limit: seconds
        for limit, seconds in _PATIENCE.items()
        if limit in known and f"WANDB_{limit.upper()}" not in os.environ
    }
    return {"settings": limits}


def finish(name: str, tracker: Any) -> None:
    """End the run. Trackio says that it uploads also where it writes a file on this machine."""
    elsewhere = any(os.environ.get(f"TRACKIO_{place}") for place in ("SPACE_ID", "SERVER_URL"))
    with nullcontext() if name != "trackio" or elsewhere else redirect_stdout(StringIO()):
        tracker.finish()
        if name == "trackio" and "trackio" in sys.modules:  # it would end the run again at exit
            with suppress(RuntimeError):  # it has no run
                sys.modules["trackio"].finish()


@contextmanager
def _nobody_to_ask() -> Iterator[None]:
    """Without a terminal to read from: services would wait there for an account."""
    terminal = sys.stdin
    with Path(os.devnull).open(encoding="utf-8") as nothing:
        sys.stdin = nothing
        try:
            yield
        finally:
            sys.stdin = terminal


def log_image(name: str, tag: str, image_HWC: np.ndarray, step: int, tracker: Any) -> None:
    """A picture, uint8 RGB."""
    if name == "trackio":  # accelerate's has no images
        import trackio

        tracker.log({tag: trackio.Image(image_HWC)}, step=step)
    elif name == "tensorboard":
        tracker.log_images({tag: image_HWC.transpose(2, 0, 1)[None]}, step=step)
    else:
        tracker.log_images({tag: [image_HWC]}, step=step)


def log_histogram(name: str, tag: str, histogram: Histogram, step: int, tracker: Any) -> None:
    """A distribution, as the service draws them; nothing where its version cannot."""
    counts, edges, centres = histogram.counts, histogram.edges, histogram.centres
    if name == "tensorboard":
        tracker.tracker.add_histogram_raw(
            tag,
            min=edges[0],
            max=edges[-1],
            num=counts.sum(),
            sum=(counts * centres).sum(),
            sum_squares=(counts * centres**2).sum(),
            bucket_limits=edges[1:].tolist(),
            bucket_counts=counts.tolist(),
            global_step=step,
        )
    elif name == "swanlab":
        import swanlab

        if hasattr(swanlab, "echarts"):
            bars = swanlab.echarts.Bar()
            bars.add_xaxis([f"{centre:.3g}" for centre in centres])
            bars.add_yaxis(tag, counts.tolist())
            tracker.log({tag: bars}, step=step)
    else:
        package = import_module(name)
        if hasattr(package, "Histogram"):
            tracker.log({tag: package.Histogram(np_histogram=(counts, edges))}, step=step)
