"""Batches of images, each image from its own noise."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from prunedm.architecture import Inputs, Shape, answer
from prunedm.errors import UserError
from prunedm.networks.inference import evaluating
from prunedm.progress import Bar, Progress, Silent
from prunedm.randomness import generator_for
from prunedm.sampling.fast import FastDenoiser, native_types
from prunedm.sampling.schedule import for_sampler, set_steps
from prunedm.task.codec import Codec
from prunedm.task.condition import Condition


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

    The compute batch is constant, the last one padded, so that an image's bits do not depend on
    how many others are asked for. `starts` are the first images of the batches to draw where not
    all are wanted. `condition` says what each image is told. `speed` "exact" is float32 as the
    denoiser is; "fast" see `FastDenoiser`: close to that, not the same bits; `made` is shown each one.
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
                if isinstance(call, FastDenoiser) and _went_too_far(call, x_NCHW):
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
            f"image {first} is not finite: the model's weights are broken, or this sampler is not for "
            "it; try --sampler ddim"
        )


def _went_too_far(call: FastDenoiser, x_NCHW: torch.Tensor) -> bool:
    """Beyond float16; the other types reach as far as float32."""
    return call.dtype == torch.float16 and not bool(x_NCHW.isfinite().all())


def _wider(call: FastDenoiser, denoiser: nn.Module, progress: Progress) -> FastDenoiser:
    """For the calls that are left, in a type that reaches as far as float32."""
    progress.say("float16 is too narrow for this model; its images are drawn in a wider type")
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
