"""Images of a model: the one way from a model folder's contents to uint8 pictures."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from prunedm.folder import Model
from prunedm.progress import Progress
from prunedm.sampling.draw import sample_batches
from prunedm.sampling.fast import FastDenoiser
from prunedm.sampling.schedule import make_sampler
from prunedm.task.condition import Condition


def draw_images(
    model: Model,
    *,
    count: int,
    steps: int,
    sampler: str = "ddim",
    spacing: str = "trailing",
    condition: Condition | None = None,
    seed: int = 0,
    batch_size: int = 64,
    starts: Sequence[int] | None = None,
    device: torch.device | str = "cpu",
    speed: str = "exact",
    progress: Progress | None = None,
    made: Callable[[FastDenoiser], object] = lambda call: None,
) -> Iterator[torch.Tensor]:
    """Images 0..count-1 of the model as uint8 NCHW batches on the CPU; see `sample_batches`.

    condition: what they are told; where nothing is given, what the model's own says (classes in turn).
    """
    return sample_batches(
        model.denoiser,
        make_sampler(model.scheduler, sampler, spacing),
        codec=model.codec,
        condition=condition or model.condition,
        count=count,
        steps=steps,
        seed=seed,
        batch_size=batch_size,
        starts=starts,
        device=device,
        speed=speed,
        progress=progress,
        made=made,
    )


def images_of(
    model: Model,
    count: int,
    steps: int,
    *,
    sampler: str = "ddim",
    seed: int = 0,
    batch_size: int | None = None,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> np.ndarray:
    """`count` images at once, uint8 NHWC; drawn together, but for 64 at most, unless told."""
    batches = draw_images(
        model,
        count=count,
        steps=steps,
        sampler=sampler,
        seed=seed,
        batch_size=batch_size or min(64, count),
        device=device,
        progress=progress,
    )
    return np.ascontiguousarray(torch.cat(list(batches)).permute(0, 2, 3, 1).numpy())
