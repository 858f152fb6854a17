"""Latency of one denoiser call: warm-up, repeats, median and spread."""

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

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
class Latency:
    """Median and half the interquartile range, in milliseconds, of one call with `batch` images."""

    median_ms: float
    spread_ms: float
    batch: int


@dataclass(frozen=True)
class Way:
    """How the denoiser is called: images at a time, bf16 autocast or its own type, compiled or not."""

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
    """Seconds of each call in each of `repeats` turns: what else the machine does falls on all alike.

    `warmup` turns before them do not count. `each`: calls in a row that make a turn; the seconds are
    of one. `device`: whose work is waited for.
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


def latency(
    network: nn.Module, inputs: Inputs, *, repeats: int, device: torch.device | str = "cpu"
) -> Latency:
    """Time `network` on these inputs, eager, in its own dtype."""
    return latencies([(network, inputs)], repeats=repeats, device=device)[0]


def latencies(
    asked: Sequence[tuple[nn.Module, Inputs]], *, repeats: int, device: torch.device | str = "cpu"
) -> list[Latency]:
    """Time several networks in turns, so that what else the machine does falls on all alike."""
    return _latencies(asked, way=Way(_rows(asked[0][1])), repeats=repeats, device=device)


def timings(
    asked: Sequence[tuple[nn.Module, Inputs]],
    way: Way,
    *,
    repeats: int,
    device: torch.device | str = "cpu",
) -> list[Timing]:
    """As `latencies`, with how each was called and which kernel ran.

    Compiled networks are timed one after the other: the compiler gives up on the eighth that is
    alive. Raises `UserError` where nothing was compiled.
    """
    timed = _compiled if way.compiled else _plainly
    neighbours = Neighbours()
    found = timed(asked, way, repeats, device)
    others = neighbours.share
    return [
        Timing(
            batch=way.batch,
            dtype="bf16 autocast" if way.bf16 else dtype_in_words(network),
            threads=torch.get_num_threads(),
            compiled=way.compiled,
            kernel=kernel_name,
            median_ms=latency.median_ms,
            spread_ms=latency.spread_ms,
            others=others,
        )
        for (network, _), (latency, kernel_name) in zip(asked, found, strict=True)
    ]


def _rows(inputs: Inputs) -> int:
    return len(next(iter(inputs.values())))


@torch.inference_mode()
def _latencies(
    asked: Sequence[tuple[nn.Module, Inputs]],
    *,
    way: Way,
    repeats: int,
    device: torch.device | str,
) -> list[Latency]:
    device = torch.device(device)
    calls = [one_call(network.eval().to(device), inputs) for network, inputs in asked]
    with _autocast(device, way):
        seconds = in_turns(calls, repeats=repeats, device=device)
    low, median, high = np.percentile(1000 * np.array(seconds), [25, 50, 75], axis=1)
    return [
        Latency(float(m), float(h - q) / 2, way.batch)
        for q, m, h in zip(low, median, high, strict=True)
    ]


def _plainly(
    asked: Sequence[tuple[nn.Module, Inputs]],
    way: Way,
    repeats: int,
    device: torch.device | str,
) -> list[tuple[Latency, str]]:
    """In turns; and the kernel of each."""
    found = _latencies(asked, way=way, repeats=repeats, device=device)
    kernels = [_kernel(network, inputs, way) for network, inputs in asked]
    return list(zip(found, kernels, strict=True))


def _compiled(
    asked: Sequence[tuple[nn.Module, Inputs]],
    way: Way,
    repeats: int,
    device: torch.device | str,
) -> list[tuple[Latency, str]]:
    from torch._dynamo import reset  # slow to import
    from torch._dynamo.utils import counters

    found = []
    for network, inputs in asked:
        reset()
        counters.clear()
        fast: nn.Module = torch.compile(network)  # type: ignore[assignment]
        found += _plainly([(fast, inputs)], way, repeats, device)
        if not counters["stats"]["unique_graphs"]:
            raise UserError("torch.compile compiled nothing: it ran the eager model")
    reset()
    return found


def _kernel(network: nn.Module, inputs: Inputs, way: Way) -> str:
    device = next(network.parameters()).device
    with torch.inference_mode(), _autocast(device, way):
        return kernel(one_call(network, inputs))


def _autocast(device: torch.device, way: Way) -> AbstractContextManager[object]:
    return torch.autocast(device.type, torch.bfloat16) if way.bf16 else nullcontext()


def dtype_in_words(denoiser: nn.Module) -> str:
    """The weights' type; and on CUDA whether convolutions round float32 to TF32 on the way."""
    weight = next(denoiser.parameters())
    name = str(weight.dtype).removeprefix("torch.")
    rounded = weight.dtype == torch.float32 and weight.device.type == "cuda"
    return f"{name} (TF32 convolutions)" if rounded and tf32_convolutions() else name


def tf32_convolutions() -> bool:
    """Whether PyTorch lets cuDNN do so; GPUs before Ampere have no TF32."""
    if torch.cuda.get_device_capability() < (8, 0):
        return False
    try:
        return bool(torch.backends.cudnn.allow_tf32)
    except RuntimeError:  # set by the newer names, which do not go together with this one
        precision: str = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
        return precision == "tf32"


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


LATENCY = Metric(
    "latency_ms",
    "latency ms",
    "one denoiser call: median ± half the distance between the quartiles",
    fixed(2),
    Measurement("latency", "turns"),
    spread="latency_spread_ms",
    conditions="Latency: one denoiser call with a batch of {latency_batch} in {dtype} on {device}; the "
    f"median of {{latency_repeats}} calls after {WARMUP} warm-up calls, ± half the interquartile range. "
    "Other work on the machine counts.",
)
