"""`torch.compile` where a compiler works; otherwise eager, with a message."""

import torch
from torch import nn

from prunedm.errors import first_line
from prunedm.progress import Progress


def compiled(module: nn.Module, device: torch.device, progress: Progress) -> nn.Module:
    """A compiled module that shares the parameters of `module`, or `module` itself."""
    reason = why_not(device)
    if reason:
        progress.say(f"compile: {reason}; training continues uncompiled")
        return module
    wrapped: nn.Module = torch.compile(module)  # type: ignore[assignment]
    return wrapped


def why_not(device: torch.device) -> str:
    """Why compilation fails here; "" where it works. Compiles a small function to find out."""
    try:
        torch.compile(_probe)(torch.ones(2, device=device))
    except Exception as error:  # no C++ compiler, no Triton, no support of this Python
        return f"not possible here ({first_line(error)})"
    return ""


def _probe(x: torch.Tensor) -> torch.Tensor:
    return torch.relu(x) + 1
