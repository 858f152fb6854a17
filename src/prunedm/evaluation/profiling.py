"""What one denoiser call takes: its memory, and the kernel that does most of the work."""

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from prunedm.architecture import Inputs, answer, like_weights
from prunedm.evaluation.metric import Measurement, Metric, Subject, fixed

Call = Callable[[], object]
MEGABYTE = 1e6
_SPARSE = ("cslt_sparse", "semi_structured", "spgemm", "sparse_mm")
_PRODUCTS = ("conv", "mm", "linear", "matmul", "attention", "einsum")


def one_call(network: nn.Module, inputs: Inputs) -> Callable[[], torch.Tensor]:
    """A call of `network` on these inputs, on its device and in its type."""
    told = like_weights(network, inputs)
    return lambda: answer(network, told)


def peak_memory(module: nn.Module, call: Call, device: torch.device | str = "cpu") -> int:
    """Bytes of parameters and buffers, plus the most that `call` allocates at any one time.

    On CPUs these are the allocations that PyTorch's profiler sees, without oneDNN's own scratch memory.
    The call's inputs exist before, and are not counted.
    """
    own = sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))
    call()  # lazily allocated buffers and workspaces do not count
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return own + int(torch.cuda.max_memory_allocated(device)) - before
    # the profiler's public events only have each operator's net allocation
    profiler: Any = _profile(call, memory=True).profiler
    changes = [
        e
        for e in profiler.kineto_results.events()
        if e.name() == "[memory]" and e.device_type() == DeviceType.CPU
    ]
    held = most = 0
    for event in sorted(changes, key=lambda e: e.start_ns()):
        held += int(event.nbytes())
        most = max(most, held)
    return own + most


def kernel(call: Call) -> str:
    """ "dense" or "semi-structured" by the operators that ran, with the slowest product in brackets."""
    call()
    seen = _profile(call).key_averages()
    sparse, products = (
        [e for e in seen if any(mark in e.key for mark in marks)] for marks in (_SPARSE, _PRODUCTS)
    )
    heaviest = max(
        sparse or products or seen, key=lambda e: (e.self_device_time_total, e.self_cpu_time_total)
    )
    return f"{'semi-structured' if sparse else 'dense'} ({heaviest.key.removeprefix('aten::')})"


def _profile(call: Call, *, memory: bool = False) -> profile:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it would log that there is no GPU
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with torch.inference_mode(), profile(activities=activities, profile_memory=memory) as seen:
        call()
    return seen


def _figures(of: Subject) -> dict[str, float]:
    with torch.inference_mode():
        call = one_call(of.denoiser, of.example(of.largest_batch))
        peak = peak_memory(of.denoiser, call, of.device) / MEGABYTE
    return {"peak_memory_mb": peak, "peak_memory_batch": of.largest_batch}


PEAK_MEMORY = Metric(
    "peak_memory_mb",
    "peak MB",
    "peak memory of one call at the largest timed batch, weights included, in MB",
    fixed(1),
    Measurement("memory", "calls", _figures),
    conditions="Peak memory: one call with a batch of {peak_memory_batch}.",
)
