"""Batches for the MaskPro trainer: epochs of denoising problems, or problems from clean images."""

import math
from collections.abc import Iterator
from typing import Any

import torch

from prunedm.errors import UserError
from prunedm.folder import Model
from prunedm.task import Batch
from prunedm.task.denoising import Denoising


class Epochs:
    """Batches of one pass over the images; each `iter` starts the next pass, in another order."""

    def __init__(self, problems: Denoising, batch_size: int) -> None:
        self.problems, self.batch_size, self.epoch = problems, batch_size, 0

    def __len__(self) -> int:
        return math.ceil(len(self.problems.images) / self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        count = len(self.problems.images)
        first, self.epoch = self.epoch * count, self.epoch + 1
        for k in range(first, first + count, self.batch_size):
            yield self.problems.batch(range(k, min(k + self.batch_size, first + count)))


def problems_of(images: Any, model: Model, generator: torch.Generator) -> Batch:
    """Noise and timesteps drawn for clean images, float NCHW in -1..1; `generator` is on the CPU.

    Raises `UserError` for anything else, and where the model needs labels.
    """
    clean_NCHW = _checked(images, model).cpu()
    noise_NCHW = torch.randn(clean_NCHW.shape, generator=generator)
    process = model.process
    step_N = torch.randint(process.steps, (len(clean_NCHW),), generator=generator)
    level_N = process.level(step_N)
    noisy_NCHW, timestep_N, target_NCHW = process.corrupt(clean_NCHW, noise_NCHW, level_N)
    return Batch({"sample": noisy_NCHW, "timestep": timestep_N}, target_NCHW, level_N)


def _checked(images: Any, model: Model) -> torch.Tensor:
    if not (torch.is_tensor(images) and images.is_floating_point() and images.ndim == 4):
        kind = str(images.dtype) if torch.is_tensor(images) else type(images).__name__
        raise UserError(f"a batch of {kind} is neither a Batch nor float images NCHW")
    shape = "x".join(map(str, model.sample_shape))
    if images.shape[1:] != model.sample_shape or not len(images):
        raise UserError(f"images have shape {tuple(images.shape)}, the model takes N of {shape}")
    if not float(images.abs().max()) <= 1 + 1e-3:  # nor NaN
        raise UserError("images are not in -1..1; prunedm.data.to_model_range converts uint8")
    if model.conditional:
        raise UserError("the model wants labels; give a Batch, as train_loader makes them")
    return images.detach().float()
