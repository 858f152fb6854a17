"""TensorBoard: event files in the stage's folder."""

from pathlib import Path
from typing import Any

import numpy as np

from prunedm.options import LoopOptions
from prunedm.training.services import Histogram, Service


class TensorBoard(Service):
    """Never needs a network."""

    name = "tensorboard"

    def needs(self, options: LoopOptions) -> dict[tuple[str, ...], str]:
        (message,) = super().needs(options).values()
        return {("tensorboard", "tensorboardX"): message}

    def settings(
        self, options: LoopOptions, *, folder: Path, run: str, done: int
    ) -> dict[str, Any]:
        # hides what an interrupted run wrote after its last checkpoint: it is written again
        return {"logging_dir": folder / "tensorboard", "purge_step": done + 1 if done else 0}

    def log_image(self, tracker: Any, tag: str, image_HWC: np.ndarray, step: int) -> None:
        tracker.log_images({tag: image_HWC.transpose(2, 0, 1)[None]}, step=step)

    def log_histogram(self, tracker: Any, tag: str, histogram: Histogram, step: int) -> None:
        counts, edges, centres = histogram.counts, histogram.edges, histogram.centres
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


TENSORBOARD = TensorBoard()
