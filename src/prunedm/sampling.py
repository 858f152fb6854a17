"""Sampling: exactly n images; image i is a function of (seed, i) alone."""

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from prunedm.data import to_uint8
from prunedm.diffusion import scheduler_class
from prunedm.errors import UserError
from prunedm.progress import Progress, Silent, Task
from prunedm.randomness import generator_for

SAMPLERS = {
    "ddpm": "DDPMScheduler",
    "ddim": "DDIMScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
}


def make_sampler(trained: Any, name: str) -> Any:
    """A diffusers scheduler for sampling with the trained one's noise schedule.

    Timesteps end at T-1 ("trailing"), so the first step starts from pure noise (Lin et al. 2023).
    """
    cls = scheduler_class(SAMPLERS.get(name, name))
    if cls is None:
        raise UserError(
            f"unknown sampler {name!r}; try {', '.join(SAMPLERS)} or a diffusers scheduler's class name"
        )
    return cls.from_config(trained.config, timestep_spacing="trailing")


def sample_batches(
    denoiser: nn.Module,
    sampler: Any,
    *,
    count: int,
    steps: int,
    shape: tuple[int, int, int],
    seed: int = 0,
    batch_size: int = 64,
    first: int = 0,
    labels: torch.Tensor | None = None,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> Iterator[torch.Tensor]:
    """Images first..count-1 as uint8 NCHW batches on the CPU.

    The compute batch is constant, the last one padded, so that an image's bits do not depend on
    how many others are asked for. `labels` are the classes of images 0..count-1.
    """
    most = sampler.config.num_train_timesteps
    if steps > most:
        raise UserError(f"{steps} sampling steps: the model has {most}; give at most that many")
    was_training = denoiser.training
    denoiser.eval().to(device)
    starts = range(first, count, batch_size)
    with (progress or Silent()).task("sampling", len(starts) * steps) as bar:
        for start in starts:
            indices = range(start, start + batch_size)
            of_batch = None if labels is None else labels[[i % len(labels) for i in indices]]
            images = _sample(
                denoiser,
                sampler,
                indices=indices,
                steps=steps,
                shape=shape,
                seed=seed,
                labels=of_batch,
                device=device,
                bar=bar,
            )
            yield images[: count - start]
    denoiser.train(was_training)


@torch.no_grad()
def _sample(
    denoiser: nn.Module,
    sampler: Any,
    *,
    indices: range,
    steps: int,
    shape: tuple[int, int, int],
    seed: int,
    labels: torch.Tensor | None,
    device: torch.device | str,
    bar: Task,
) -> torch.Tensor:
    generators = [generator_for(seed, "sample", i) for i in indices]
    noise = torch.stack([torch.randn(shape, generator=g) for g in generators])
    sampler.set_timesteps(steps)
    arguments = {}
    if "generator" in inspect.signature(sampler.step).parameters:
        arguments["generator"] = generators
    x_NCHW = (noise * sampler.init_noise_sigma).to(device)
    labels = None if labels is None else labels.to(device)
    for t in sampler.timesteps:
        model_input = sampler.scale_model_input(x_NCHW, t)
        output = denoiser(model_input, t.to(device), labels, return_dict=False)[0]
        x_NCHW = sampler.step(output, t, x_NCHW, **arguments).prev_sample
        bar.advance()
    return to_uint8(x_NCHW).cpu()


def class_labels(model_classes: int, count: int, label: int | None) -> torch.Tensor:
    """The class of each image: `label`, or all classes in turn."""
    if label is not None and label >= model_classes:
        raise UserError(f"label {label} is not below the model's {model_classes} classes")
    turn = torch.arange(count) % model_classes
    return turn if label is None else torch.full((count,), label)
