"""prune: score the weights, remove the lowest by a mechanism, write a smaller or sparser model."""

from pathlib import Path
from typing import Any

from prunedm.data.images import ImageSet
from prunedm.errors import UserError
from prunedm.evaluation.loss import denoising_loss
from prunedm.evaluation.pictures import grid
from prunedm.evaluation.size import count_macs, count_nonzero, count_parameters
from prunedm.folder import Model, save
from prunedm.options import PruneOptions
from prunedm.progress import Progress
from prunedm.record import finite, write_json
from prunedm.sampling import images_of
from prunedm.stages.frame import Plan, Request
from prunedm.stages.inputs import (
    DataSet,
    data_for,
    data_source,
    device_for,
    given_model,
    held_out_problems,
    model_sources,
)
from prunedm.stages.pruning.job import Details, PruneJob, asks, check_options, left_out
from prunedm.tables import MECHANISMS
from prunedm.task import Batch

# per layer or block: only in pruning_stats.json
_LONG = ("layers", "dense", "patterns", "permutation", "influence")
PICTURE_STEPS = 25  # DDIM steps of the pictures before and after
PROBLEMS = range(16, 65)  # in the loss before and after, unless an option says how many
PROBLEMS_MACS = 6e11  # most MACs of one pass over them


def prune(request: Request[PruneOptions]) -> Plan:
    """Prune `source` and write a model folder, `pruning_stats.json` and `vis/`."""
    options, progress = request.options, request.progress
    model = given_model(request.source, options, progress)
    if model.masks is not None:
        raise UserError(
            f"{request.source} has masks already; prune the model that they were made from"
        )
    check_options(options, model)
    data = _data(model, options, progress)
    inputs = model_sources(model) | ({"dataset": data_source(data)} if data else {})

    def make(folder: Path) -> dict[str, Any]:
        figures = _prune(model, data, options, folder, progress)
        save(model, folder)
        return figures

    return Plan(options=options, inputs=inputs, parent=model.record, make=make)


def _data(model: Model, options: PruneOptions, progress: Progress) -> DataSet | None:
    """The training data; None where the default ones do not fit and are not needed."""
    try:
        return data_for(model, options, "train", progress)
    except UserError as error:
        named = "dataset" in options.model_fields_set and not model.unasked
        if named or asks(options):
            raise
        progress.say(f"{error}: sizes alone are measured, no loss and no pictures")
        return None


def _prune(
    model: Model, data: DataSet | None, options: PruneOptions, folder: Path, progress: Progress
) -> dict[str, Any]:
    held_out = [] if data is None else _held_out(model, options)
    before = _summary(model, held_out, options)
    draws = isinstance(data, ImageSet) and options.pictures > 0
    if draws:
        _picture(model, options, folder / "vis" / "before_pruning.png")
    details: Details = MECHANISMS[options.mechanism](PruneJob(model, options, data, progress))
    if experts := left_out(model.denoiser):
        weights = sum(model.denoiser.get_parameter(name).numel() for name in experts)
        share = weights / count_parameters(model.denoiser)
        progress.say(
            f"{len(experts)} tensors of experts, {share:.0%} of the weights, are not pruned"
        )
        details["dense"] = details.get("dense", {}) | experts
    if model.masks is not None:
        model.masks.check_pattern()
        model.masks.apply_(model.denoiser)
    model.round_to_dtype()
    after = _summary(model, held_out, options)
    if draws:
        _picture(model, options, folder / "vis" / "after_pruning.png")
    write_json({"before": before, "after": after} | details, folder / "pruning_stats.json")
    sizes = [k for k in ("params", "nonzero", "macs") if k in before]
    removed = {f"{k}_removed": 1 - after[k] / before[k] for k in sizes}
    shown = {key: value for key, value in details.items() if key not in _LONG}
    loss_before = {"loss_before": before["loss"]} if held_out else {}
    return {**loss_before, **after, **removed, **shown}


def _held_out(model: Model, options: PruneOptions) -> list[Batch]:
    """As many problems as asked for, or as are cheap."""
    count = options.problems
    if count is None:
        cheap = int(PROBLEMS_MACS / count_macs(model.denoiser, model.example()))
        count = min(max(cheap, PROBLEMS[0]), PROBLEMS[-1])
    return held_out_problems(model, options, count) if count else []


def _summary(model: Model, held_out: list[Batch], options: PruneOptions) -> dict[str, Any]:
    """Sizes, and the loss with its standard error, if there are problems."""
    sizes = {
        "params": count_parameters(model.denoiser),
        "nonzero": count_nonzero(model.denoiser),
    }
    if not model.unasked:
        sizes["macs"] = count_macs(model.denoiser, model.example())
    if not held_out:
        return sizes
    device = device_for(options.device)
    loss = denoising_loss(model.denoiser.to(device), held_out, device=device)
    model.denoiser.cpu()
    return sizes | {
        "loss": loss.mean,
        "loss_se": finite(loss.standard_error),  # NaN with fewer than 4 problems
        "problems": len(loss.per_problem_N),
    }


def _picture(model: Model, options: PruneOptions, path: Path) -> None:
    device = device_for(options.device)
    images = images_of(model, options.pictures, PICTURE_STEPS, seed=options.seed, device=device)
    model.denoiser.cpu()
    path.parent.mkdir(exist_ok=True)
    grid(images, 8).save(path)
