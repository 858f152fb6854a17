"""prune: score the weights, remove the lowest by a mechanism, write a smaller or sparser model."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from prunedm.data import ImageSet
from prunedm.errors import UserError
from prunedm.evaluation.loss import denoising_loss
from prunedm.evaluation.pictures import grid
from prunedm.evaluation.size import count_macs, count_nonzero, count_parameters
from prunedm.folder import Model, save
from prunedm.options import PruneOptions
from prunedm.progress import Progress
from prunedm.record import write_json
from prunedm.sampling import make_sampler, sample_batches
from prunedm.stages.frame import Plan, Request
from prunedm.stages.inputs import (
    data_source,
    device_for,
    given_model,
    held_out_problems,
    images_for,
    model_sources,
)
from prunedm.stages.pruning.job import Details, Job, check_options
from prunedm.stages.verbs.sample import labels_for
from prunedm.tables import MECHANISMS
from prunedm.task import Batch

_LONG = ("layers", "dense", "patterns", "permutation")  # per layer: in pruning_stats.json only
PICTURE_STEPS = 25  # DDIM steps of the pictures before and after
HELD_OUT = 500  # problems behind the loss before and after, where they are cheap
HELD_OUT_MACS = 6e11  # of one pass over them; at least FEWEST, whatever a problem costs
FEWEST = 16


def prune(request: Request[PruneOptions]) -> Plan:
    """Prune `source` and write a model folder, `pruning_stats.json` and `vis/`."""
    options, progress = request.options, request.progress
    model = given_model(request.source, options, progress)
    if model.masks is not None:
        raise UserError(
            f"{request.source} has masks already; prune the model that they were made from"
        )
    check_options(options, model.scheduler.config.num_train_timesteps)
    images = images_for(model, options, "train")
    inputs = {**model_sources(model), "dataset": data_source(images)}

    def make(folder: Path) -> dict[str, Any]:
        figures = _prune(model, images, options, folder, progress=progress)
        save(model, folder)
        return figures

    return Plan(options=options, inputs=inputs, parent=model.record, make=make)


def _prune(
    model: Model, images: ImageSet, options: PruneOptions, folder: Path, *, progress: Progress
) -> dict[str, Any]:
    macs = count_macs(model.denoiser, model.example())
    affordable = max(FEWEST, int(HELD_OUT_MACS / macs))  # the loss is given with its standard error
    held_out = held_out_problems(model, options, min(HELD_OUT, affordable))
    before = _summary(model, held_out, options)
    _picture(model, options, folder / "vis" / "before_pruning.png")
    details: Details = MECHANISMS[options.mechanism](Job(model, options, images, progress))
    if model.masks is not None:
        model.masks.check_pattern()
        model.masks.apply_(model.denoiser)
    model.round_to_dtype()
    after = _summary(model, held_out, options)
    _picture(model, options, folder / "vis" / "after_pruning.png")
    write_json({"before": before, "after": after} | details, folder / "pruning_stats.json")
    removed = {f"{k}_removed": 1 - after[k] / before[k] for k in ("params", "nonzero", "macs")}
    shown = {key: value for key, value in details.items() if key not in _LONG}
    return {"loss_before": before["loss"], **after, **removed, **shown}


def _summary(model: Model, held_out: list[Batch], options: PruneOptions) -> dict[str, Any]:
    device = device_for(options.device)
    loss = denoising_loss(model.denoiser.to(device), held_out, device=device)
    model.denoiser.cpu()
    return {
        "params": count_parameters(model.denoiser),
        "nonzero": count_nonzero(model.denoiser),
        "macs": count_macs(model.denoiser, model.example()),
        "loss": loss.mean,
        "loss_se": loss.standard_error,
    }


def _picture(model: Model, options: PruneOptions, path: Path) -> None:
    count = options.pictures
    if not count:
        return
    batches = sample_batches(
        model.denoiser,
        make_sampler(model.scheduler, "ddim"),
        count=count,
        steps=PICTURE_STEPS,
        shape=model.sample_shape,
        seed=options.seed,
        batch_size=count,
        labels=labels_for(model, count),
        device=device_for(options.device),
    )
    images = torch.cat(list(batches)).permute(0, 2, 3, 1).numpy()
    model.denoiser.cpu()
    path.parent.mkdir(exist_ok=True)
    grid(np.ascontiguousarray(images), 8).save(path)
