"""Which layers can be pruned, and how their weights fall into N:M groups.

This is the only file that knows the axis. A group is M consecutive *input channels* at a fixed
output channel and kernel tap, the one layout that sparse hardware accepts:

    Linear       W[O, I]          -> (O * I/M, M)
    Convolution  W[O, I, *taps]   -> [O, *taps, I] -> (O * taps * I/M, M)

Weights, masks and scores are [O, I, *taps] here (`layer_kinds.oriented`).
"""

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from prunedm.architecture import Inputs, answer, architecture_of
from prunedm.errors import UserError
from prunedm.networks.layer_kinds import find_kind, groups_of, to_matrix, width_of

Hook = Callable[[str, nn.Module, tuple[Any, ...], Any], None]  # name, module, inputs, output
Named = dict[str, Any]
BeforeHook = Callable[[str, nn.Module, tuple[Any, ...], Named], None]  # and its named inputs


@contextmanager
def hooked(modules: Mapping[str, nn.Module], hook: Hook) -> Iterator[None]:
    """Within the context, call `hook(name, module, inputs, output)` after every call of a module."""
    handles = [
        module.register_forward_hook(partial(hook, name)) for name, module in modules.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def hooked_before(modules: Mapping[str, nn.Module], hook: BeforeHook) -> Iterator[None]:
    """Within the context, call `hook(name, module, inputs, named)` before every call of a module."""
    handles = [
        module.register_forward_pre_hook(partial(hook, name), with_kwargs=True)
        for name, module in modules.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def prunable_layers(
    denoiser: nn.Module, targets: Iterable[str] = (), *, protect: Iterable[str] | None = None
) -> dict[str, nn.Module]:
    """Layers of a kind in `layer_kinds.KINDS` by name, except those that the architecture protects.

    `targets` selects some: each is a prefix of module names, or a regular expression found in them.
    Raises `UserError` for a target that matches nothing.
    """
    protect = architecture_of(denoiser).protect if protect is None else tuple(protect)
    layers: dict[str, nn.Module] = {
        name: module
        for name, module in denoiser.named_modules()
        if find_kind(module) is not None and not is_under(name, protect)
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


@torch.no_grad()
def layer_positions(network: nn.Module, inputs: Inputs) -> dict[str, int]:
    """Output positions (pixels, tokens) of each layer, per row of `inputs`; 0 if it takes no part."""
    layers = prunable_layers(network, protect=())
    positions = dict.fromkeys(layers, 0)
    rows = len(next(iter(inputs.values())))  # a layer may see more: tokens folded into its batch

    def record(name: str, layer: nn.Module, _: object, output: torch.Tensor) -> None:
        positions[name] = output.numel() // (rows * width_of(layer, "out"))

    with hooked(layers, record):
        answer(network, inputs)
    return positions


def why_not_nm(layer: nn.Module, m: int) -> str | None:
    """None where the layer can have groups of M, else the reason why not.

    A last group is never padded: a padded slot could be kept and break N.
    """
    if groups_of(layer) > 1:
        return "grouped convolution"
    inputs = width_of(layer, "in")
    return f"{inputs} input channels are not a multiple of {m}" if inputs % m else None


def to_groups(weight: torch.Tensor, m: int) -> torch.Tensor:
    """W[O, I, *taps] => (groups, M), the inverse of `layer_kinds.from_matrix`.

    A view for linear layers, a copy for kernels of several taps.
    """
    assert weight.shape[1] % m == 0, f"{tuple(weight.shape)} has no groups of {m}"
    return to_matrix(weight).reshape(-1, m)


def replace_module(root: nn.Module, name: str, module: nn.Module) -> None:
    """Replace the module with this dotted name."""
    parent, _, own = name.rpartition(".")
    setattr(root.get_submodule(parent), own, module)


def is_under(name: str, parents: Iterable[str]) -> bool:
    """Whether a module is one of these patterns, or inside one of them."""
    return any(re.fullmatch(rf"{parent}(\..*)?", name) for parent in parents)


def _near(target: str, names: Iterable[str]) -> str:
    """The modules whose names are closest to a target, or the blocks where none is close."""
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
        raise UserError(f"target {target!r} is not a regular expression: {error}") from error
