"""Latency of one denoiser call: warm-up, repeats, median and spread."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from prunedm.architecture import Inputs
from prunedm.errors import UserError
from prunedm.evaluation.metric import Measurement, Metric, fixed
from prunedm.evaluation.profiling import Call, kernel, one_call
from prunedm.evaluation.results import Timing
from prunedm.system.neighbours import Neighbours

WARMUP = 3


@dataclass(frozen=True)
class Way:
    """How the denoiser is called: batch size, bf16 autocast or its own type, compiled or eager."""

    batch: int
    bf16: bool = False
    compiled: bool = False

    def __str__(self) -> str:
        kind = " bf16" * self.bf16 + " compiled" * self.compiled
        return f"latency{kind}, batch {self.batch}"


def in_turns(
    calls: Sequence[Call],
    *,
    repeats: int,
    warmup: int = WARMUP,
    each: int = 1,
    device: torch.device | str = "cpu",
) -> list[list[float]]:
    """Seconds of each call in each of `repeats` turns, so that other load affects all calls alike.

    `warmup` turns before them do not count. `each`: calls per turn, whose mean is taken. `device`:
    where the work runs, to be synchronized.
    """
    device = torch.device(device)
    seconds: list[list[float]] = [[] for _ in calls]
    for turn in range(-warmup, repeats):
        for taken, call in zip(seconds, calls, strict=True):
            _wait(device)
            started = time.perf_counter()
            for _ in range(each):
                call()
            _wait(device)
            if turn >= 0:
                taken.append((time.perf_counter() - started) / each)
    return seconds


def timings(
    asked: Sequence[tuple[nn.Module, Inputs]],
    way: Way,
    *,
    repeats: int,
    device: torch.device | str = "cpu",
) -> list[Timing]:
    """Time several networks on their inputs in turns, and name the kernel that ran.

    Compiled networks are timed one after another, because the compiler gives up on the eighth that is
    alive. Raises `UserError` where nothing was compiled.
    """
    device = torch.device(device)
    neighbours = Neighbours()
    timed = _compiled if way.compiled else _timed
    found = timed(asked, way, repeats, device)
    others = neighbours.share
    return [
        Timing(
            batch=way.batch,
            dtype="bf16 autocast" if way.bf16 else dtype_in_words(network),
            threads=torch.get_num_threads(),
            compiled=way.compiled,
            others=others,
            **measured,
        )
        for (network, _), measured in zip(asked, found, strict=True)
    ]


@torch.inference_mode()
def _timed(
    asked: Sequence[tuple[nn.Module, Inputs]], way: Way, repeats: int, device: torch.device
) -> list[dict[str, Any]]:
    """Median and spread in milliseconds of each call, in turns; then its kernel."""
    calls = [one_call(network.eval().to(device), inputs) for network, inputs in asked]
    with torch.autocast(device.type, torch.bfloat16, enabled=way.bf16):
        seconds = in_turns(calls, repeats=repeats, device=device)
    low, median, high = np.percentile(1000 * np.array(seconds), [25, 50, 75], axis=1)
    with torch.autocast(device.type, torch.bfloat16, enabled=way.bf16):
        kernels = [kernel(call) for call in calls]
    return [
        {"median_ms": float(m), "spread_ms": float(h - q) / 2, "kernel": name}
        for q, m, h, name in zip(low, median, high, kernels, strict=True)
    ]


def _compiled(
    asked: Sequence[tuple[nn.Module, Inputs]], way: Way, repeats: int, device: torch.device
) -> list[dict[str, Any]]:
    from torch._dynamo import reset  # slow to import
    from torch._dynamo.utils import counters

    found = []
    for network, inputs in asked:
        reset()
        counters.clear()
        fast: nn.Module = torch.compile(network)  # type: ignore[assignment]
        found += _timed([(fast, inputs)], way, repeats, device)
        if not counters["stats"]["unique_graphs"]:
            raise UserError("torch.compile compiled nothing: it ran the eager model")
    reset()
    return found


def dtype_in_words(denoiser: nn.Module) -> str:
    """The weights' type, and whether CUDA convolutions round float32 to TF32."""
    weight = next(denoiser.parameters())
    name = str(weight.dtype).removeprefix("torch.")
    rounded = weight.dtype == torch.float32 and weight.device.type == "cuda"
    return f"{name} (TF32 convolutions)" if rounded and tf32_convolutions() else name


def tf32_convolutions() -> bool:
    """Whether PyTorch allows TF32 in cuDNN; GPUs before Ampere do not have it."""
    if torch.cuda.get_device_capability() < (8, 0):
        return False
    try:
        return bool(torch.backends.cudnn.allow_tf32)
    except RuntimeError:  # set through the newer API, which excludes this one
        precision: str = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
        return precision == "tf32"


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


LATENCY = Metric(
    "latency_ms",
    "latency ms",
    "one denoiser call: median ± half the interquartile range",
    fixed(2),
    Measurement("latency", "turns"),
    spread="latency_spread_ms",
    conditions="Latency: one denoiser call with a batch of {latency_batch} in {dtype} on {device}; the "
    f"median of {{latency_repeats}} calls after {WARMUP} warm-up calls, ± half the interquartile range. "
    "Other work on the machine counts.",
)
