"""The verbs: each reads a model folder, does one thing, and writes a new folder with a record.

`STAGES` has one record a verb (table.py); `prunedm.stages.prune` is that of the verb. Nothing heavy is
imported before one is called.
"""

from importlib import import_module
from pathlib import Path
from typing import Any

from prunedm.options import EvaluateOptions, TrainOptions
from prunedm.progress import Progress
from prunedm.record import Record
from prunedm.stages.table import STAGES

__all__ = ["STAGES", "check_inputs", "compare", "train", *(set(STAGES) - {"train"})]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name == "compare":
        return import_module("prunedm.stages.verbs.compare").compare
    if name in STAGES:
        return STAGES[name]
    raise AttributeError(f"module 'prunedm.stages' has no attribute {name!r}")


def train(
    out: str | Path,
    options: TrainOptions,
    *,
    progress: Progress | None = None,
    overwrite: bool = False,
) -> tuple[Record, bool]:
    """Train `options.unet` on `options.dataset` and write a model folder."""
    return STAGES["train"]("", out, options, progress=progress, overwrite=overwrite)


def check_inputs(model: str, options: EvaluateOptions) -> None:
    """Open everything that a long run will need at its end. Raises `UserError` where it would fail."""
    from prunedm.folder import load
    from prunedm.sampling import make_sampler
    from prunedm.stages.evaluating.quality import with_features
    from prunedm.stages.inputs import images_for

    loaded = load(model)
    for split in ("train", "test"):
        images = images_for(loaded, options, split)
        images[0]
    with_features(options, images)
    make_sampler(loaded.scheduler, options.sampler)
