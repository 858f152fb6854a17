"""loss: the denoising loss of a model, or of its weights under other masks, batch by batch."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from prunedm.errors import UserError
from prunedm.evaluation.loss import LossEstimate, denoising_loss
from prunedm.folder import Model
from prunedm.masks import Masks
from prunedm.options import LossOptions
from prunedm.progress import Progress
from prunedm.record import finite
from prunedm.stages.frame import Plan, Request
from prunedm.stages.inputs import DataSet, device_for, held_out_count, problems_on, read_inputs
from prunedm.stages.masks import masks_from


def loss(request: Request[LossOptions]) -> Plan:
    """Write the losses of batches and of problems; the model stays as it is.

    Problem p depends only on (seed, p); on the test split it is that of `evaluate`.
    Raises `UserError` where the masks are of another model.
    """
    options, progress = request.options, request.progress
    model, data, inputs = read_inputs(request, options.split)
    masks = model.masks
    if options.masks:
        masks, found = masks_from(options.masks, model.denoiser, targets=options.targets)
        inputs["masks"] = found.source
        masks.apply_(model.denoiser)
    elif options.targets:
        raise UserError("--targets narrows the layers of --masks; give --masks too")

    def make(folder: Path) -> dict[str, Any]:
        per_batch = _losses(model, data, options, progress)
        means_B = np.array([float(losses_N.double().mean()) for losses_N in per_batch])
        losses_N = torch.cat(per_batch)
        np.save(folder / "losses.npy", means_B, allow_pickle=False)
        np.save(folder / "per_problem.npy", losses_N.numpy(), allow_pickle=False)
        return _figures(LossEstimate.of(losses_N), len(per_batch), masks)

    return Plan(options=options, inputs=inputs, parent=model.record, make=make)


def _losses(
    model: Model, data: DataSet, options: LossOptions, progress: Progress
) -> list[torch.Tensor]:
    """Losses of each batch's problems (N,)."""
    size, count = options.batch_size, held_out_count(data, options.problems)
    if options.max_batches is not None:
        count = min(count, options.max_batches * size)
    # the problems of every held-out loss, so that losses compare problem by problem
    stream = problems_on(data, model, options.seed).stream(count, size=size)
    device = device_for(options.device)
    denoiser = model.denoiser.to(device)
    losses = []
    with progress.task("held-out loss", len(stream)) as bar:
        for batch in stream:
            losses.append(denoising_loss(denoiser, [batch], device=device).per_problem_N)
            bar.advance()
    model.denoiser.to("cpu")
    return losses


def _figures(found: LossEstimate, batches: int, masks: Masks | None) -> dict[str, Any]:
    return {
        "loss": found.mean,
        "loss_se": finite(found.standard_error),  # NaN with fewer than two pairs of problems
        "batches": batches,
        "problems": len(found.per_problem_N),
        "masked_layers": len(masks.by_layer) if masks else 0,
        "kept": masks.kept / masks.total if masks else 1.0,
    }
