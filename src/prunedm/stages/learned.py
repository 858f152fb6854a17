"""What learning leaves beside the model: logits, losses, and a picture of how it went."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from safetensors.torch import save_file

from prunedm.learning.trainer import Learned
from prunedm.masks import save_masks
from prunedm.training.checkpoint import History

FOLDER = "learned"  # in the model folder; no part of the model, so its hash does not depend on it
CURVES = "training_curves.png"


def write_learned(learned: Learned, folder: Path, *, dense: float, first: float) -> None:
    """`learned/` with logits, the last masks and losses, and `training_curves.png`.

    logits.safetensors: the kept logits by layer, each of its weight's shape.
    masks_last.safetensors: the masks of the last step; the model has those that were kept.
    loss_training.npy: the estimator's loss of every step.
    loss_improvements.npy: (steps done, loss of the first masks less that of the hard masks then).
    """
    place = folder / FOLDER
    place.mkdir(exist_ok=True)
    save_file(
        {name: value.contiguous() for name, value in learned.logits.items()},
        place / "logits.safetensors",
    )
    save_masks(learned.last, place / "masks_last.safetensors")
    np.save(place / "loss_training.npy", np.asarray(learned.history.losses), allow_pickle=False)
    improvements = [(step, first - loss) for step, loss in learned.history.held_out]
    np.save(place / "loss_improvements.npy", np.asarray(improvements), allow_pickle=False)
    _picture(learned.history, folder / CURVES, dense=dense, first=first)


def _picture(history: History, path: Path, *, dense: float, first: float) -> None:
    """Four panels over the steps: losses, entropy, groups changed, compliance."""
    figure = Figure(figsize=(10, 6.2), layout="constrained")
    FigureCanvasAgg(figure)
    (top_left, top_right), (low_left, low_right) = figure.subplots(2, 2)
    _losses(top_left, history, dense=dense, first=first)
    for axes, key, title, percent in (
        (top_right, "entropy", "entropy of a group (nats)", False),
        (low_left, "groups_changed", "groups changed (%)", True),
        (low_right, "compliance", "groups with exactly N kept (%)", True),
    ):
        points = history.observed.get(key, [])
        axes.plot(*_columns(points, 100 if percent else 1), color="tab:blue", marker=".")
        axes.set_title(title, fontsize=10)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("step")
    low_right.set_ylim(0, 105)
    figure.savefig(path, dpi=110)


def _losses(axes, history: History, *, dense: float, first: float) -> None:  # type: ignore[no-untyped-def]
    axes.plot(*_columns(history.held_out), marker=".", label="hard masks, held out")
    axes.axhline(dense, color="gray", linestyle="--", linewidth=1, label="dense")
    axes.axhline(first, color="tab:red", linestyle=":", linewidth=1, label="first masks")
    axes.set_title("loss", fontsize=10)
    axes.set_xlabel("step")
    axes.legend(fontsize=8)


def _columns(points: Sequence[tuple[int, float]], factor: float = 1.0) -> tuple[list[float], ...]:
    return [step for step, _ in points], [factor * value for _, value in points]
