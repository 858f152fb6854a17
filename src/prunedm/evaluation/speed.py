"""Latency of one denoiser call: warm-up, repeats, median and spread."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

WARMUP = 3


@dataclass(frozen=True)
class Latency:
    """Median and half the interquartile range, in milliseconds, of one call with `batch` images."""

    median_ms: float
    spread_ms: float
    batch: int


def latency(
    denoiser: nn.Module,
    shape: tuple[int, int, int],
    *,
    batch: int,
    repeats: int,
    device: torch.device | str = "cpu",
) -> Latency:
    """Time `denoiser` on images of `shape` (C, H, W), eager, in its own dtype."""
    return latencies([denoiser], shape, batch=batch, repeats=repeats, device=device)[0]


@torch.inference_mode()
def latencies(
    denoisers: Sequence[nn.Module],
    shape: tuple[int, int, int],
    *,
    batch: int,
    repeats: int,
    device: torch.device | str = "cpu",
) -> list[Latency]:
    """Time several denoisers in turns, so that what else the machine does falls on all alike."""
    calls = [_call(denoiser.eval().to(device), shape, batch) for denoiser in denoisers]
    times = np.empty((WARMUP + repeats, len(calls)))
    for repeat in range(WARMUP + repeats):
        for k, call in enumerate(calls):
            _wait(torch.device(device))
            started = time.perf_counter()
            call()
            _wait(torch.device(device))
            times[repeat, k] = (time.perf_counter() - started) * 1000
    low, median, high = np.percentile(times[WARMUP:], [25, 50, 75], axis=0)
    return [
        Latency(float(m), float(h - q) / 2, batch)
        for q, m, h in zip(low, median, high, strict=True)
    ]


def _call(denoiser: nn.Module, shape: tuple[int, int, int], batch: int) -> Callable[[], object]:
    weight = next(denoiser.parameters())
    sample = torch.randn(batch, *shape, device=weight.device, dtype=weight.dtype)
    timesteps = torch.full((batch,), 500, device=weight.device)
    conditional = getattr(denoiser, "class_embedding", None) is not None
    labels = torch.zeros(batch, dtype=torch.long, device=weight.device) if conditional else None
    return lambda: denoiser(sample, timesteps, labels, return_dict=False)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
