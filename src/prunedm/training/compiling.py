"""`torch.compile` where there is a compiler; eager, with the reason told, where there is none."""

import torch
from torch import nn

from prunedm.progress import Progress


def compiled(module: nn.Module, device: torch.device, progress: Progress) -> nn.Module:
    """`module` as a compiled one that shares its parameters, or `module` itself."""
    reason = why_not(device)
    if reason:
        progress.say(f"compile: {reason}; training goes on uncompiled")
        return module
    wrapped: nn.Module = torch.compile(module)  # type: ignore[assignment]
    return wrapped


def why_not(device: torch.device) -> str:
    """Why nothing can be compiled here; "" where it can. A small function is compiled to find out."""
    try:
        torch.compile(_probe)(torch.ones(2, device=device))
    except Exception as error:  # no C++ compiler, no Triton, no support of this Python
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return f"not possible here ({lines[0]})"
    return ""


def _probe(x: torch.Tensor) -> torch.Tensor:
    return torch.relu(x) + 1
