"""Dropping whole residual blocks: a dropped block passes its inputs on.

A `Skipped` takes its place, so the other blocks keep their numbers: their names in masks, adapters and
checkpoints, the layers that a ControlNet adds to, and indices in a config (SD3's
`dual_attention_layers`).
"""

import ast
import inspect
import re
import textwrap
from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from torch import nn

from prunedm.errors import UserError
from prunedm.networks.layers import replace_module


class Skipped(nn.Module):
    """Stands for a dropped residual block: returns its inputs."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        kind: Any = type(block)
        self.inputs, self.wrapped = _passed_on(kind)

    def forward(self, *args: torch.Tensor, **named: torch.Tensor) -> object:
        """The block's inputs, at the positions where it would return their changed versions."""
        passed = tuple(
            args[place] if place < len(args) else named.get(name) for name, place in self.inputs
        )
        return passed if self.wrapped else passed[0]


def drop_blocks(network: nn.Module, names: Iterable[str]) -> None:
    """Drop these residual blocks in place. Raises `UserError` for one that cannot be dropped."""
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise UserError("dropped is not a list of names of blocks")
    for name in names:
        block = dict(network.named_modules()).get(name) if isinstance(name, str) else None
        if block is None or not name:
            raise UserError(f"dropped: the architecture has no block named {name!r}")
        _check_droppable(network, name, block)
        replace_module(network, name, Skipped(block))


def dropped_blocks(network: nn.Module) -> list[str]:
    """Names of the dropped blocks, in the network's order."""
    return [name for name, module in network.named_modules() if isinstance(module, Skipped)]


def _check_droppable(network: nn.Module, name: str, block: nn.Module) -> None:
    kind: Any = type(block)
    parent = name.rpartition(".")[0]
    numbered = isinstance(network.get_submodule(parent), nn.ModuleList) or name == "mid_block"
    if not numbered or not list(block.children()) or isinstance(block, nn.ModuleList):
        raise UserError(f"dropped: {name!r} is a {kind.__name__}, not one of a row of blocks")
    if re.search("(up|down)sampl", kind.__name__.lower()) or any(
        getattr(block, inside, None) is not None for inside in ("upsample", "downsample")
    ):
        raise UserError(f"dropped: {name!r} changes the size of its input, so it must stay")
    widths = getattr(block, "in_channels", 0), getattr(block, "out_channels", 0)
    if None not in widths and widths[0] != widths[1]:
        raise UserError(
            f"dropped: {name!r} turns {widths[0]} channels into {widths[1]}; it must stay"
        )
    place = re.escape(parent) + r"\[" + re.escape(name.rpartition(".")[2]) + r"\]"
    if re.search(place, inspect.getsource(type(network).forward)):
        raise UserError(
            f"dropped: {type(network).__name__} also uses parts of {name!r}; it must stay"
        )
    _passed_on(kind)


@cache
def _passed_on(cls: Any) -> tuple[tuple[tuple[str, int], ...], bool]:
    """Names and positions of the inputs that a block returns, and whether it returns a tuple.

    Read from the block's source: it assigns the sums to the names of its inputs and returns those;
    two-stream blocks differ in their order.
    """
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls.forward)))
    names = [name for name in inspect.signature(cls.forward).parameters if name != "self"]
    answers = [node.value for node in ast.walk(tree) if isinstance(node, ast.Return)]
    if "return_dict" in names:  # UNets call their blocks for a tuple
        return ((names[0], 0),), True
    forms = {_form(answer, names) for answer in answers}
    if len(forms) != 1 or None in forms:
        raise UserError(
            f"dropped: a {cls.__name__} returns more than its inputs changed; drop blocks inside it"
        )
    (form,) = forms
    assert form is not None
    return tuple((name, names.index(name)) for name in form[0]), form[1]


def _form(answer: ast.expr | None, names: list[str]) -> tuple[tuple[str, ...], bool] | None:
    if isinstance(answer, ast.Name) and answer.id in names:
        return (answer.id,), False
    if not isinstance(answer, ast.Tuple):
        return (names[0],), False
    returned = tuple(part.id for part in answer.elts if isinstance(part, ast.Name))
    known = len(returned) == len(answer.elts) and set(returned) <= set(names)
    return (returned, True) if known else None
