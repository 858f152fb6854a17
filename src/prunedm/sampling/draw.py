"""Images of a model, each from its own noise."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from prunedm.architecture import Inputs, Shape, answer
from prunedm.errors import UserError
from prunedm.folder import Model
from prunedm.networks.inference import evaluating
from prunedm.progress import Bar, Progress, Silent
from prunedm.randomness import generator_for
from prunedm.sampling.fast import FastDenoiser, native_types
from prunedm.sampling.schedule import for_sampler, make_sampler, set_steps
from prunedm.task.codec import Codec
from prunedm.task.condition import Condition


def draw_images(
    model: Model,
    *,
    sampler: str = "ddim",
    spacing: str = "trailing",
    condition: Condition | None = None,
    **options: Any,
) -> Iterator[torch.Tensor]:
    """Images 0..count-1 of the model as uint8 NCHW batches on the CPU.

    condition: instead of the model's own (classes in turn). options: those of `sample_batches`.
    """
    return sample_batches(
        model.denoiser,
        make_sampler(model.scheduler, sampler, spacing),
        codec=model.codec,
        condition=condition or model.condition,
        **options,
    )


def images_of(
    model: Model, count: int, steps: int, *, batch_size: int | None = None, **options: Any
) -> np.ndarray:
    """`count` images, uint8 NHWC; `options` as in `draw_images`, at most 64 in a batch by default."""
    size = batch_size or min(64, count)
    batches = draw_images(model, count=count, steps=steps, batch_size=size, **options)
    return np.ascontiguousarray(torch.cat(list(batches)).permute(0, 2, 3, 1).numpy())


def sample_batches(
    denoiser: nn.Module,
    sampler: Any,
    *,
    codec: Codec,
    condition: Condition,
    count: int,
    steps: int,
    seed: int = 0,
    batch_size: int = 64,
    starts: Sequence[int] | None = None,
    device: torch.device | str = "cpu",
    speed: str = "exact",
    progress: Progress | None = None,
    made: Callable[[FastDenoiser], object] = lambda call: None,
) -> Iterator[torch.Tensor]:
    """Images 0..count-1 as uint8 NCHW batches on the CPU.

    The compute batch is constant and the last one padded, so that an image's bits do not depend on
    how many are drawn. starts: first images of the batches to draw, if not all. condition: gives the
    denoiser's conditioning inputs for each image. speed: "exact" runs the denoiser as it is; "fast"
    runs a `FastDenoiser`, which is close but not bit-identical. made: called with each `FastDenoiser`.
    """
    progress = progress or Silent()
    starts = range(0, count, batch_size) if starts is None else starts
    set_steps(sampler, steps, codec.shape)
    calls = len(starts) * len(sampler.timesteps)
    denoiser.to(device)
    assert speed in ("exact", "fast"), speed
    call: nn.Module = denoiser
    with evaluating(denoiser):
        if speed == "fast":
            call = FastDenoiser(denoiser, calls=calls, say=progress.say)
            made(call)
        with progress.task("sampling", calls) as bar:
            for start in starts:
                indices = range(start, start + batch_size)
                draw = partial(
                    _sample,
                    sampler=sampler,
                    indices=indices,
                    steps=steps,
                    shape=codec.shape,
                    seed=seed,
                    told=condition.drawn(indices),
                    device=device,
                    bar=bar,
                )
                x_NCHW = draw(call)
                if isinstance(call, FastDenoiser) and _overflowed(call, x_NCHW):
                    call = _wider(call, denoiser, progress)
                    made(call)
                    x_NCHW = draw(call)
                x_NCHW = x_NCHW[: count - start]
                _check_finite(x_NCHW, start)
                yield codec.decode(x_NCHW).cpu()


def _check_finite(x_NCHW: torch.Tensor, start: int) -> None:
    finite_N = x_NCHW.isfinite().flatten(1).all(1)
    if not finite_N.all():
        first = start + int((~finite_N).nonzero()[0])
        raise UserError(
            f"image {first} is not finite: the model's weights are broken, or this sampler does not "
            "suit it; try --sampler ddim"
        )


def _overflowed(call: FastDenoiser, x_NCHW: torch.Tensor) -> bool:
    """Whether float16 overflowed; the other types have the range of float32."""
    return call.dtype == torch.float16 and not bool(x_NCHW.isfinite().all())


def _wider(call: FastDenoiser, denoiser: nn.Module, progress: Progress) -> FastDenoiser:
    """A denoiser for the remaining calls, in a type with the range of float32."""
    progress.say("this model overflows float16; its images are drawn in a wider type")
    wide = next(kind for kind in native_types(call.device) if kind != torch.float16)
    return FastDenoiser(denoiser, calls=call.calls - call.seen, say=progress.say, dtype=wide)


@torch.no_grad()
def _sample(
    denoiser: nn.Module,
    *,
    sampler: Any,
    indices: range,
    steps: int,
    shape: Shape,
    seed: int,
    told: Inputs,
    device: torch.device | str,
    bar: Bar,
) -> torch.Tensor:
    generators = [generator_for(seed, "sample", i) for i in indices]
    noise = torch.stack([torch.randn(shape, generator=g) for g in generators])
    set_steps(sampler, steps, shape)
    arguments = {}
    if "generator" in inspect.signature(sampler.step).parameters:
        arguments["generator"] = generators
    x_NCHW = (noise * getattr(sampler, "init_noise_sigma", 1.0)).to(device)
    scaled = getattr(sampler, "scale_model_input", lambda x, t: x)
    given = {name: tensor.to(device) for name, tensor in told.items()}
    for t in sampler.timesteps:
        inputs = {"sample": scaled(x_NCHW, t), "timestep": t.to(device).repeat(len(x_NCHW))} | given
        output = answer(denoiser, inputs)
        output = for_sampler(sampler, output, x_NCHW)
        x_NCHW = sampler.step(output, t, x_NCHW, **arguments).prev_sample
        bar.advance()
    return x_NCHW
