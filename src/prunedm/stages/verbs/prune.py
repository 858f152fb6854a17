"""prune: score the weights, remove the lowest by a mechanism, write a smaller or sparser model."""

import math
from pathlib import Path
from typing import Any

from prunedm.data import ImageSet
from prunedm.errors import UserError
from prunedm.evaluation.loss import denoising_loss
from prunedm.evaluation.pictures import grid
from prunedm.evaluation.size import count_macs, count_nonzero, count_parameters
from prunedm.folder import Model, save
from prunedm.options import PruneOptions
from prunedm.progress import Progress, Silent
from prunedm.record import Record, write_json
from prunedm.sampling import images_of
from prunedm.stages.frame import Overwrite, run_stage
from prunedm.stages.inputs import (
    data_source,
    device_for,
    given_model,
    held_out_problems,
    images_for,
    model_sources,
)
from prunedm.stages.pruning.job import Job, check_options
from prunedm.stages.pruning.mechanisms import MECHANISMS
from prunedm.task import Batch

_LONG = ("layers", "dense", "patterns", "permutation")  # per layer: in pruning_stats.json only
PICTURE_STEPS = 25  # DDIM steps of the pictures before and after
PROBLEMS = range(16, 65)  # behind the loss before and after, where options name no number
PROBLEMS_MACS = 6e11  # what one pass over them may cost


def prune(
    source: str | Path,
    out: str | Path,
    options: PruneOptions = PruneOptions(),
    *,
    progress: Progress | None = None,
    overwrite: Overwrite = False,
) -> tuple[Record, bool]:
    """Prune `source` and write a model folder, `pruning_stats.json` and `vis/`."""
    progress = progress or Silent()
    model = given_model(source, options, progress)
    if model.masks is not None:
        raise UserError(f"{source} has masks already; prune the model that they were made from")
    check_options(options, model.process)
    images = images_for(model, options, "train", progress)
    inputs = {**model_sources(model), "dataset": data_source(images)}

    def make(folder: Path) -> dict[str, Any]:
        figures = _prune(model, images, options, folder, progress=progress)
        save(model, folder)
        return figures

    return run_stage(
        "prune",
        out,
        options=options,
        inputs=inputs,
        parent=model.record,
        make=make,
        overwrite=overwrite,
    )


def _prune(
    model: Model, images: ImageSet, options: PruneOptions, folder: Path, *, progress: Progress
) -> dict[str, Any]:
    held_out = _held_out(model, options)
    before = _summary(model, held_out, options)
    _picture(model, options, folder / "vis" / "before_pruning.png")
    details = MECHANISMS[options.mechanism](Job(model, options, images, progress))
    if model.masks is not None:
        model.masks.check_pattern()
        model.masks.apply_(model.denoiser)
    model.round_to_dtype()
    after = _summary(model, held_out, options)
    _picture(model, options, folder / "vis" / "after_pruning.png")
    write_json({"before": before, "after": after} | details, folder / "pruning_stats.json")
    removed = {f"{k}_removed": 1 - after[k] / before[k] for k in ("params", "nonzero", "macs")}
    shown = {key: value for key, value in details.items() if key not in _LONG}
    loss_before = {"loss_before": before["loss"]} if held_out else {}
    return {**loss_before, **after, **removed, **shown}


def _held_out(model: Model, options: PruneOptions) -> list[Batch]:
    """As many problems as asked for, or as are cheap: the loss has its standard error beside it."""
    count = options.problems
    if count is None:
        cheap = int(PROBLEMS_MACS / count_macs(model.denoiser, model.example()))
        count = min(max(cheap, PROBLEMS[0]), PROBLEMS[-1])
    return held_out_problems(model, options, count) if count else []


def _summary(model: Model, held_out: list[Batch], options: PruneOptions) -> dict[str, Any]:
    """Sizes; and the loss with its standard error and number of problems, where there are any."""
    sizes = {
        "params": count_parameters(model.denoiser),
        "nonzero": count_nonzero(model.denoiser),
        "macs": count_macs(model.denoiser, model.example()),
    }
    if not held_out:
        return sizes
    device = device_for(options.device)
    loss = denoising_loss(model.denoiser.to(device), held_out, device=device)
    model.denoiser.cpu()
    error = None if math.isnan(loss.standard_error) else loss.standard_error  # of fewer than 4
    problems = len(loss.per_problem_N)
    return sizes | {"loss": loss.mean, "loss_se": error, "problems": problems}


def _picture(model: Model, options: PruneOptions, path: Path) -> None:
    count = options.pictures
    if not count:
        return
    device = device_for(options.device)
    images = images_of(model, count, PICTURE_STEPS, seed=options.seed, device=device)
    model.denoiser.cpu()
    path.parent.mkdir(exist_ok=True)
    grid(images, 8).save(path)
