"""What quantization costs: losses and distances of the model and of the file."""

from dataclasses import replace
from typing import Any

import numpy as np
from torch import nn

from prunedm.deployment.runtimes import ExportedDenoiser
from prunedm.evaluation.fid import distance_figures
from prunedm.evaluation.loss import LossEstimate, denoising_loss
from prunedm.evaluation.paired import psnr
from prunedm.sampling import images_of
from prunedm.stages.evaluating.quality import features_of
from prunedm.stages.exporting.job import Data, ExportJob
from prunedm.stages.inputs import device_for


def before_and_after(job: ExportJob, exported: ExportedDenoiser) -> dict[str, Any]:
    """Figures of the record: loss and its change on the same problems; FD and PSNR, same noise."""
    data = job.data
    assert data is not None
    before, after = (
        denoising_loss(denoiser, data.held_out, progress=job.progress)
        for denoiser in (job.model.denoiser, exported)
    )
    change = LossEstimate.of(after.per_problem_N - before.per_problem_N)
    figures: dict[str, Any] = {
        "loss_before": before.mean,
        "loss": after.mean,
        "loss_se": after.standard_error,
        "loss_change": change.mean,
        "loss_change_se": change.standard_error,
    }
    if data.evaluate.samples:
        figures |= _distances(job, data, exported)
    return figures


def _distances(job: ExportJob, data: Data, exported: ExportedDenoiser) -> dict[str, Any]:
    images = [_images(job, data, denoiser) for denoiser in (job.model.denoiser, exported)]
    figures: dict[str, Any] = {
        "samples": data.evaluate.samples,
        "psnr": float(np.mean(psnr(images[1], images[0]))),
    }
    if data.network is None:
        return figures
    device = device_for(job.options.device)
    for suffix, images_NHWC in zip(("_before", ""), images, strict=True):
        own_ND, real_ND = features_of(
            images_NHWC, data.reference, data.network, device, most=data.evaluate.references
        )
        found = distance_figures(own_ND, real_ND, data.network.name, seed=job.options.seed)
        figures |= {f"{name}{suffix}": value for name, value in found.items()}
    return figures | {"features": data.network.name}


def _images(job: ExportJob, data: Data, denoiser: nn.Module) -> np.ndarray:
    """uint8 NHWC."""
    return images_of(
        replace(job.model, denoiser=denoiser),
        int(data.evaluate.samples or 0),
        int(data.evaluate.sampling_steps or 0),
        sampler=data.evaluate.sampler,
        seed=job.options.seed,
        progress=job.progress,
    )
