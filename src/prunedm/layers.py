"""Which layers can be pruned, and how their weights fall into N:M groups.

This is the only file that knows the axis. A group is M consecutive *input channels* at a fixed
output channel and kernel tap, the one layout that sparse hardware accepts:

    Linear  W[O, I]          -> (O * I/M, M)
    Conv2d  W[O, I, kh, kw]  -> permute to [O, kh, kw, I] -> (O * kh * kw * I/M, M)
"""

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from prunedm.architecture import architecture_of
from prunedm.errors import UserError

Hook = Callable[[str, nn.Module, tuple[Any, ...], Any], None]  # name, module, inputs, output


@contextmanager
def hooked(modules: Mapping[str, nn.Module], hook: Hook) -> Iterator[None]:
    """`hook(name, module, inputs, output)` after every call of these modules, while this lasts."""
    handles = [
        module.register_forward_hook(partial(hook, name)) for name, module in modules.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def prunable_layers(
    denoiser: nn.Module, targets: Iterable[str] = (), *, protect: Iterable[str] | None = None
) -> dict[str, nn.Module]:
    """Conv2d and Linear layers by name, without the protected ones: those of its architecture.

    `targets` narrows them: each is a prefix of module names, or a regular expression found in them.
    Raises `UserError` for a target that matches nothing.
    """
    protect = architecture_of(denoiser).protect if protect is None else tuple(protect)
    layers: dict[str, nn.Module] = {
        name: module
        for name, module in denoiser.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear) and not is_under(name, protect)
    }
    wanted = tuple(targets)
    for target in wanted:
        if not any(_matches(name, target) for name in layers):
            if is_under(target, protect):
                raise UserError(f"target {target!r} is protected: {', '.join(protect)} stay whole")
            raise UserError(f"target {target!r} matches no layer; {_near(target, layers)}")
    if not wanted:
        return layers
    return {n: m for n, m in layers.items() if any(_matches(n, t) for t in wanted)}


def why_not_nm(layer: nn.Module, m: int) -> str | None:
    """None where the layer can take groups of M, else the reason it stays dense.

    A last group is never padded: a padded slot could be kept and break N.
    """
    if isinstance(layer, nn.Conv2d) and layer.groups > 1:
        return "grouped convolution"
    inputs = layer.in_channels if isinstance(layer, nn.Conv2d) else layer.in_features
    assert isinstance(inputs, int)
    return f"{inputs} input channels are no multiple of {m}" if inputs % m else None


def to_groups(weight: torch.Tensor, m: int) -> torch.Tensor:
    """W[O, I, ...] => (groups, M). A view for Linear, a copy for convolutions with kernels > 1."""
    assert weight.shape[1] % m == 0, f"{tuple(weight.shape)} has no groups of {m}"
    channels_last = weight.permute(0, 2, 3, 1) if weight.ndim == 4 else weight
    return channels_last.reshape(-1, m)


def from_groups(groups_GM: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """The inverse of `to_groups` for a weight of `shape`."""
    if len(shape) == 4:
        out, inputs, height, width = shape
        return groups_GM.reshape(out, height, width, inputs).permute(0, 3, 1, 2)
    return groups_GM.reshape(shape)


def padded_inputs(layer: nn.Conv2d, inputs_NIHW: torch.Tensor) -> torch.Tensor:
    """Inputs of a convolution with its own padding around them, whatever its mode, "same" too."""
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    return F.pad(inputs_NIHW, layer._reversed_padding_repeated_twice, mode=mode)


def replace_module(root: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` in the place of the one that is reached by `name`, dotted."""
    parent, _, own = name.rpartition(".")
    setattr(root.get_submodule(parent), own, module)


def is_under(name: str, parents: Iterable[str]) -> bool:
    """Whether a module is one of these patterns, or inside one of them."""
    return any(re.fullmatch(rf"{parent}(\..*)?", name) for parent in parents)


def _near(target: str, names: Iterable[str]) -> str:
    """The modules whose names are closest to a target, or where there are none, the blocks."""
    parts = [name.split(".") for name in names]
    modules = {".".join(part[:k]) for part in parts for k in range(1, len(part) + 1)}
    near = difflib.get_close_matches(target, sorted(modules), n=3, cutoff=0.6)
    if near:
        return f"near ones are {', '.join(near)}"
    return f"there are {', '.join(sorted({'.'.join(part[:2]) for part in parts}))}"


def _matches(name: str, target: str) -> bool:
    if name == target or name.startswith(target.rstrip(".") + "."):
        return True
    try:
        return re.search(target, name) is not None
    except re.error as error:
        raise UserError(f"target {target!r} is no regular expression: {error}") from error
