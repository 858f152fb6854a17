"""2:4 layers on sparse tensor cores: each layer's dense and sparse forms are timed, the fastest kept."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from prunedm.architecture import Inputs
from prunedm.errors import UserError
from prunedm.evaluation.speed import Call, in_turns, one_call
from prunedm.networks.inference import evaluating
from prunedm.networks.layer_kinds import weight_of, width_of
from prunedm.networks.layers import hooked, prunable_layers, replace_module
from prunedm.progress import Progress, Silent
from prunedm.randomness import seed_for
from prunedm.sparse_kernels.gemm import HALF, Kernel, find_kernels, in_words
from prunedm.sparse_kernels.layers import candidates, to_sparse, why_not_sparse

TOLERANCE = 0.02  # relative error of the denoiser's output; half precision alone gives about 0.001
_WARMUP, _TURNS, _CALLS = 3, 15, 10

Timer = Callable[[Sequence[Call]], list[float]]  # milliseconds of each call
Met = tuple[torch.Tensor, int]  # a layer's first input on the meta device, and its GEMM's rows


@dataclass(frozen=True)
class Choice:
    """The decision for one layer, a GEMM of B x O x K; `pixels` B is None where nothing was run."""

    name: str
    kind: str
    outputs: int
    columns: int
    pixels: int | None = None
    dense_ms: float | None = None
    form: str = ""  # the fastest sparse one
    sparse_ms: float | None = None
    chosen: bool = False
    reason: str = ""  # for not timing or not replacing it

    @property
    def speedup(self) -> float | None:
        """Dense over sparse time; None where not timed."""
        return self.dense_ms / self.sparse_ms if self.dense_ms and self.sparse_ms else None


@dataclass(frozen=True)
class Selection:
    """All layers' choices, and the denoiser's relative error (None where nothing changed)."""

    choices: list[Choice]
    relative_error: float | None = None

    @property
    def chosen(self) -> list[Choice]:
        return [choice for choice in self.choices if choice.chosen]


def time_in_turns(calls: Sequence[Call]) -> list[float]:
    """The median of turns of ten calls in eager PyTorch; launch-bound calls take the launch time."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    seconds = in_turns(calls, repeats=_TURNS, warmup=_WARMUP, each=_CALLS, device=device)
    return [1000 * statistics.median(taken) for taken in seconds]


def time_graphs(calls: Sequence[Call]) -> list[float]:
    """As `time_in_turns` with CUDA graphs: without launches, for denoisers to be compiled."""
    return [took / _CALLS for took in time_in_turns([_captured(call) for call in calls])]


@torch.no_grad()
def use_sparse_kernels(
    denoiser: nn.Module,
    inputs: Inputs,
    *,
    dtype: torch.dtype = torch.float16,
    kernels: Sequence[Kernel] | None = None,
    timer: Timer = time_in_turns,
    tolerance: float = TOLERANCE,
    progress: Progress | None = None,
) -> Selection:
    """Replace in place each 2:4 layer whose sparse form is faster, for calls like `inputs`.

    Layers must have weights of `dtype` on an NVIDIA GPU: cast and move the denoiser before. To compile
    it afterwards, time with `timer=time_graphs`. `kernels` are by default those of the GPU; without any,
    nothing is timed or changed, and the choices say which layers would be eligible. Raises `UserError`,
    with the dense layers back in place, where the output's relative error is above `tolerance`.
    """
    progress = progress or Silent()
    layers = prunable_layers(denoiser, protect=())
    why = ""
    if kernels is None:
        kernels, why = find_kernels(next(denoiser.parameters()).device, dtype)
    if why:
        progress.say(f"no layer is replaced: {why}")
        return Selection([_unmeasured(n, layer, dtype) for n, layer in layers.items()])
    call = _steady(denoiser, inputs, dtype)
    with evaluating(denoiser):
        before, met = _observed(call, layers)
        choices, faster = [], {}
        with progress.task("timing layers", len(layers)) as bar, _autocast(denoiser, dtype):
            for name, layer in layers.items():
                choice, module = _fastest(
                    name, layer, met.get(name), dtype=dtype, kernels=kernels, timer=timer
                )
                choices.append(choice)
                if module is not None:
                    faster[name] = module
                bar.advance(note=name)
        if not faster:
            return Selection(choices)
        error = _replaced(denoiser, layers, faster, call, before, tolerance=tolerance)
        return Selection(choices, error)


def time_forms(
    layer: nn.Module,
    x: torch.Tensor,
    dtype: torch.dtype,
    kernels: Sequence[Kernel],
    timer: Timer,
) -> tuple[float, dict[str, tuple[float, nn.Module]]]:
    """Milliseconds on `x` of a 2:4 layer as it is, and of each sparse form that runs, by name."""
    modules: dict[str, nn.Module] = {}
    for kernel, form in candidates(layer, dtype, kernels)[0]:
        try:
            module = to_sparse(layer, kernel, form).eval()
            module(x)
            modules[f"{form}, {kernel.name}"] = module
        except RuntimeError:  # out of memory, or an unsupported shape
            continue
    dense_ms, *sparse_ms = timer([lambda m=m: m(x) for m in (layer, *modules.values())])  # type: ignore[misc]
    return dense_ms, {
        name: (took, module)
        for (name, module), took in zip(modules.items(), sparse_ms, strict=True)
    }


def _fastest(
    name: str,
    layer: nn.Module,
    met: Met | None,
    *,
    dtype: torch.dtype,
    kernels: Sequence[Kernel],
    timer: Timer,
) -> tuple[Choice, nn.Module | None]:
    """The choice for one layer, and its replacement, if any."""
    choice = _described(name, layer, met and met[1])
    weight = weight_of(layer)
    reason = why_not_sparse(layer, dtype, kernels)
    if reason is None and weight.dtype != dtype:
        reason = f"its weights are {in_words(weight.dtype)}, not {in_words(dtype)}"
    if reason is not None or met is None:
        return replace(choice, reason=reason or "not called"), None
    generator = torch.Generator(weight.device).manual_seed(seed_for(0, "sparse kernels"))
    x = torch.empty_like(met[0], device=weight.device).normal_(generator=generator)
    dense_ms, sparse = time_forms(layer, x, dtype, kernels, timer)
    if not sparse:
        return replace(choice, dense_ms=dense_ms, reason="no sparse form runs"), None
    form = min(sparse, key=lambda f: sparse[f][0])
    sparse_ms, module = sparse[form]
    choice = replace(choice, dense_ms=dense_ms, form=form, sparse_ms=sparse_ms)
    if sparse_ms >= dense_ms:
        return replace(choice, reason="dense is faster"), None
    return replace(choice, chosen=True), module


def _replaced(
    denoiser: nn.Module,
    layers: Mapping[str, nn.Module],
    faster: Mapping[str, nn.Module],
    call: Callable[[], torch.Tensor],
    before: torch.Tensor,
    *,
    tolerance: float,
) -> float:
    """Put the faster forms in; returns the output's relative error. Undone if it is too large."""
    kept = False
    try:
        for name, module in faster.items():
            replace_module(denoiser, name, module)
        error = float((call() - before).norm() / before.norm().clamp_min(1e-30))
        kept = error <= tolerance
    finally:
        if not kept:
            for name in faster:
                replace_module(denoiser, name, layers[name])
    if not kept:
        raise UserError(
            f"sparse kernels change the denoiser's output by a relative error of {error:.2g}, above "
            f"{tolerance:g}; the dense layers are back: use them, or bfloat16 if float16 overflows"
        )
    return error


def _observed(
    call: Callable[[], torch.Tensor], layers: Mapping[str, nn.Module]
) -> tuple[torch.Tensor, dict[str, Met]]:
    """The denoiser's output, and what each layer met on the way."""
    met: dict[str, Met] = {}

    def hear(name: str, layer: Any, inputs: Any, output: torch.Tensor) -> None:
        met.setdefault(name, (inputs[0].to("meta"), output.numel() // width_of(layer, "out")))

    with hooked(layers, hear):
        return call(), met


def _steady(denoiser: nn.Module, inputs: Inputs, dtype: torch.dtype) -> Callable[[], torch.Tensor]:
    """A call that gives the denoiser's output for these inputs in float32."""
    run = one_call(denoiser, inputs)

    def call() -> torch.Tensor:
        with _autocast(denoiser, dtype):
            return run().float()

    return call


def _unmeasured(name: str, layer: nn.Module, dtype: torch.dtype) -> Choice:
    reason = why_not_sparse(layer, dtype)
    return replace(_described(name, layer, None), reason=reason or "would be eligible")


def _described(name: str, layer: nn.Module, pixels: int | None) -> Choice:
    weight = weight_of(layer)
    kind = "linear"
    if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        stride = f", stride {layer.stride[0]}" if layer.stride[0] > 1 else ""
        kind = f"{'x'.join(map(str, layer.kernel_size))} convolution{stride}"
    return Choice(name, kind, len(weight), weight[0].numel(), pixels)


def _captured(call: Call) -> Call:
    """Ten calls as one CUDA graph."""
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(_WARMUP):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(_CALLS):
            call()
    return graph.replay


def _autocast(denoiser: nn.Module, dtype: torch.dtype) -> AbstractContextManager[object]:
    """Autocast for denoisers with only their layers in half precision, like `FastDenoiser`'s."""
    weight = next(denoiser.parameters())
    mixed = dtype in HALF and weight.dtype == torch.float32
    return torch.autocast(weight.device.type, dtype) if mixed else nullcontext()
