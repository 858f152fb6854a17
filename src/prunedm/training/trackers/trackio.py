"""Trackio: one place on this machine for all runs, or a Space."""

import os
import sys
from contextlib import nullcontext, redirect_stdout, suppress
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np

from prunedm.options import LoopOptions
from prunedm.training.services import Service, title_of


class Trackio(Service):
    """Knows runs by name."""

    name = "trackio"

    def settings(
        self, options: LoopOptions, *, folder: Path, run: str, done: int
    ) -> dict[str, Any]:
        return {"name": f"{title_of(folder)}-{run[:6]}", "resume": "allow"}

    def log_image(self, tracker: Any, tag: str, image_HWC: np.ndarray, step: int) -> None:
        import trackio  # accelerate's tracker has no images

        tracker.log({tag: trackio.Image(image_HWC)}, step=step)

    def finish(self, tracker: Any) -> None:
        """End the run, hiding the claim of an upload where a local file is written."""
        elsewhere = any(os.environ.get(f"TRACKIO_{place}") for place in ("SPACE_ID", "SERVER_URL"))
        with nullcontext() if elsewhere else redirect_stdout(StringIO()):
            tracker.finish()
            if "trackio" in sys.modules:  # would end the run again at exit
                with suppress(RuntimeError):  # it has no run
                    sys.modules["trackio"].finish()


TRACKIO = Trackio()
