"""A denoiser for fast sampling: channels-last, half precision where safe, compiled if it pays."""

import copy
import re
import time
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import nn

from prunedm.architecture import Inputs, answer, architecture_of
from prunedm.errors import first_line
from prunedm.networks.layer_kinds import find_kind

# Share of an eager call that compiling saves, and the seconds it takes per module with weights of its
# own. Measured for a UNet of 91 such modules: 0.44 and 0.47 on one core, 0.77 and 0.27 on an H100. The
# values here are cautious: a wrong "no" loses part of the saving, a wrong "yes" costs a wait.
SAVED_SHARE = {"cpu": 0.3, "cuda": 0.5}
SECONDS_PER_LAYER = {"cpu": 0.8, "cuda": 0.4}


class FastDenoiser(nn.Module):
    """A copy of `denoiser` with the same interface, made for many calls of one shape.

    Convolutions and linear layers run in `dtype`, by default the first of `native_types`. The first and
    last convolution, whose rounding errors would be added to the image at every step, the embeddings
    of time and class, and the normalizations stay in float32; so do inputs, outputs and the sampler's
    arithmetic. Move the denoiser to its device before.

    The second call is timed, and the copy is compiled if the remaining `calls` pay for it (`compiling`
    "auto"; "on" compiles at the first call, "off" never). On a GPU it compiles into CUDA graphs, because
    a small denoiser spends its time on launches there. If compiling fails, `say` gets a message, and
    calls stay uncompiled.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        *,
        calls: int,
        say: Callable[[str], None] = lambda text: None,
        dtype: torch.dtype | None = None,
        compiling: str = "auto",
    ) -> None:
        super().__init__()
        self.device = next(denoiser.parameters()).device
        self.dtype = dtype or native_types(self.device)[0]
        inner = copy.deepcopy(denoiser).eval().to(memory_format=torch.channels_last)
        self.inner = inner if self.dtype == torch.float32 else _mixed(inner, self.dtype)
        self.calls, self.say, self.compiling = calls, say, compiling
        self.seen = 0
        self.compile_seconds = 0.0
        self._compiled: Callable[..., Any] | None = None
        self.graphs = self.device.type == "cuda"

    @property
    def is_compiled(self) -> bool:
        return self._compiled is not None

    def forward(
        self, sample: torch.Tensor, *, return_dict: bool = False, **others: torch.Tensor
    ) -> tuple[torch.Tensor]:
        """As the denoiser's, with float32 in and out; always a tuple."""
        assert not return_dict
        inputs = others | {"sample": sample.contiguous(memory_format=torch.channels_last)}
        self.seen += 1
        if self.seen == 1 and self.compiling == "on":
            self._compile(inputs)
        if self.seen == 2 and self.compiling == "auto":  # the first warms up
            started = self._now()
            output = self._run(self.inner, inputs)
            took, left = self._now() - started, self.calls - self.seen
            if compiling_pays(took, left, count_layers(self), self.device.type):
                self._compile(inputs)
            return (output,)
        call = self.inner if self._compiled is None else self._compiled
        return (self._run(call, inputs),)

    def _run(self, call: Any, inputs: Inputs) -> torch.Tensor:
        half = self.dtype != torch.float32
        with torch.autocast(self.device.type, self.dtype if half else None, enabled=half):
            output = answer(call, inputs)
        # the next call of a CUDA graph overwrites this one's output
        return output.float().clone() if self.graphs else output.float()

    def _compile(self, inputs: Inputs) -> None:
        started = self._now()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # harmless ones from diffusers' code
                mode = "reduce-overhead" if self.graphs else None
                call = torch.compile(self.inner, dynamic=False, mode=mode)
                self._run(call, inputs)
            self._compiled = call
        except Exception as error:  # compilers raise many types
            reason = first_line(error)
            self.say(
                f"torch.compile does not work here ({reason[:200]}); sampling continues without it"
            )
        self.compile_seconds = self._now() - started

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def compiling_pays(call_seconds: float, calls_left: int, layers: int, kind: str = "cpu") -> bool:
    """Whether compiling should save more time than it takes, on a `kind` of device."""
    kind = kind if kind in SAVED_SHARE else "cpu"
    return calls_left * call_seconds * SAVED_SHARE[kind] > layers * SECONDS_PER_LAYER[kind]


def count_layers(module: nn.Module) -> int:
    """The number of modules with weights of their own, to which compile time is proportional."""
    return sum(any(True for _ in m.parameters(recurse=False)) for m in module.modules())


def native_types(device: torch.device) -> list[torch.dtype]:
    """The types that are at least as fast as float32 on the device, best first.

    float16 is as fast as bfloat16 where the device has both, and rounds eight times finer; but it ends
    at 65,504, so images that are not finite must be drawn again in the next type.
    """
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        found = {torch.float16: capability >= (7, 0), torch.bfloat16: capability >= (8, 0)}
    else:
        found = {kind: any(map(_cpu_has, names)) for kind, names in _CPU_FEATURES.items()}
    return [kind for kind, native in found.items() if native] + [torch.float32]


_CPU_FEATURES = {
    torch.float16: ["amx_fp16"],  # with AVX512-FP16 alone, bfloat16 on AMX is several times faster
    torch.bfloat16: ["amx_tile", "avx512_bf16"],
}


def _cpu_has(feature: str) -> bool:
    # absent in old versions of torch
    return bool(getattr(torch.cpu, f"_is_{feature}_supported", lambda: False)())


class _InFloat32:
    """Mixed into a module's class: runs it outside autocast, on inputs cast to float32."""

    def forward(self, *inputs: Any, **named: Any) -> Any:
        device = next(self.parameters()).device.type  # type: ignore[attr-defined]
        with torch.autocast(device, enabled=False):
            return super().forward(  # type: ignore[misc]
                *[_widened(x) for x in inputs], **{name: _widened(x) for name, x in named.items()}
            )


@cache
def _in_float32(cls: type) -> Any:
    return type(cls.__name__, (_InFloat32, cls), {})


def _widened(value: Any) -> Any:
    return value.float() if torch.is_tensor(value) and value.is_floating_point() else value


def _mixed(denoiser: nn.Module, dtype: torch.dtype) -> nn.Module:
    """In place: cast the layers' weights to `dtype` once, and keep autocast from all other modules."""
    precise = architecture_of(denoiser).precise
    kept = [m for n, m in denoiser.named_modules() if _stays_float32(n, m, precise)]
    whole = {id(inner) for module in kept for inner in module.modules()}
    for module in denoiser.modules():
        if find_kind(module) is not None and id(module) not in whole:
            module.to(dtype)
    for module in kept:
        if next(module.parameters(), None) is not None:
            # only the class changes, so that attributes stay readable
            module.__class__ = _in_float32(type(module))  # type: ignore[arg-type]
    return denoiser


def _stays_float32(name: str, module: nn.Module, precise: Sequence[str]) -> bool:
    named = any(re.fullmatch(pattern, name) for pattern in precise)
    return named or isinstance(module, (nn.GroupNorm, nn.LayerNorm, nn.RMSNorm))
