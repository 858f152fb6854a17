"""Channels inside residual blocks, found by derivatives: heads and hidden units of any class.

The residual stream stays as it is. Within a block each layer's output is replaced by a *leaf*, a random
tensor, so that derivatives reach from a layer's input to the layers that made it, and no further.
*Makers* are layers that only *readers* read; a *unit* is the smallest set of their channels that depends
on no other: a hidden unit, or a head of keys and values with all its queries. No name and no plan of a
class is used; transformers' tensor-parallel plans say the same where they exist.

Shapes: C channels of all readers, U units.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from prunedm.architecture import Inputs, answer
from prunedm.networks.chain import chained_blocks, hidden_of
from prunedm.networks.layer_kinds import Side, find_kind, groups_of, kind_of, width_of
from prunedm.networks.layers import Named, hooked_before, is_under
from prunedm.networks.widths import attributes, set_layer_widths
from prunedm.removal.channels.groups import ChannelGroup, Counts, Coupling

TOKENS = 32  # of the sequence that blocks are asked about: no ReLU is off for all of them
MOST_HEADS = 512  # units of several channels in one block
STREAM = re.compile("hidden_size|d_model|n_embd|embed")  # attributes that say the stream's width
NEAR = 1e-4  # relative difference below which two inputs are the same, in float32

Leaves = dict[str, torch.Tensor]


def inner_groups(
    network: nn.Module, inputs: Inputs, *, protect: Iterable[str], round_to: int
) -> list[ChannelGroup]:
    """Units of every block, in groups that are narrowed together; what cannot be cut has none.

    round_to: neighbouring hidden units are merged to multiples of it. Blocks that are alike are
    looked at once.
    """
    known: dict[object, list[ChannelGroup]] = {}
    groups, protected = [], tuple(protect)
    told = _told(network, inputs)
    for name, block in chained_blocks(network).items():
        alike = _signature(block)
        if alike not in known:
            known[alike] = _groups_of_block(block, told[name], round_to)
        groups += [_inside(group, name) for group in known[alike]]
    return [g for g in groups if not any(is_under(c.layer, protected) for c in g.couplings)]


def _told(network: nn.Module, inputs: Inputs) -> dict[str, Any]:
    """The arguments of every block, for one short sequence."""
    told: dict[str, Any] = {}

    def hear(name: str, _: nn.Module, args: tuple[Any, ...], named: Named) -> None:
        told[name] = args, named

    with torch.no_grad(), hooked_before(chained_blocks(network), hear):
        answer(network, {name: x[:1, :TOKENS] for name, x in inputs.items()})
    return told


def _signature(block: nn.Module) -> object:
    """Equal for blocks of the same classes, shapes and attributes, but for their number."""
    return type(block), tuple(
        (
            name,
            type(module),
            tuple(tuple(p.shape) for p in module.parameters(recurse=False)),
            tuple(sorted((n, v) for n, v in attributes(module).items() if "layer" not in n)),
        )
        for name, module in block.named_modules()
    )


def _inside(group: ChannelGroup, block: str) -> ChannelGroup:
    """The same group with names of the whole network."""
    couplings = tuple(replace(c, layer=f"{block}.{c.layer}") for c in group.couplings)
    counts = {(f"{block}.{m}".rstrip("."), n): each for (m, n), each in group.counts.items()}
    return replace(group, name=f"{block}.{group.name}", couplings=couplings, counts=counts)


@contextmanager
def _cut(block: nn.Module, leaves: Leaves, heard: Leaves) -> Iterator[None]:
    """Within the context each layer keeps its input in `heard` and answers with its leaf.

    A layer without a leaf gets one, shaped as its output; unusual layers answer as they do.
    """
    layers = {name: m for name, m in block.named_modules() if find_kind(m) is not None}

    def cut(name: str, layer: nn.Module) -> None:
        def forward(x: torch.Tensor, *others: Any, **named: Any) -> Any:
            if name not in leaves:
                out = type(layer).forward(layer, x, *others, **named)
                if not _is_output(layer, out):  # a router, or heads folded into the batch
                    return out
                noise = torch.Generator().manual_seed(len(leaves))
                leaf = torch.randn(out.shape, generator=noise).to(out)
                leaves[name] = leaf.requires_grad_()
            heard[name] = x
            return leaves[name].clone()  # what follows may write to it

        layer.forward = forward  # type: ignore[method-assign]

    for name, layer in layers.items():
        cut(name, layer)
    try:
        yield
    finally:
        for layer in layers.values():
            del layer.forward


def _is_output(layer: nn.Module, out: object) -> bool:
    """Whether it is a tensor with as many channels as the layer makes."""
    if not isinstance(out, torch.Tensor):
        return False
    return out.shape[kind_of(layer).channel_axis] == width_of(layer, "out")


class _Probe:
    """A block whose layers are cut apart, for one set of arguments."""

    def __init__(self, block: nn.Module, told: Any) -> None:
        self.block, self.told = block, told
        self.leaves: Leaves = {}
        self.heard, self.made = self.hear(self.leaves)

    def hear(self, leaves: Leaves, block: nn.Module | None = None) -> tuple[Leaves, torch.Tensor]:
        """The inputs of all layers, and what the block (or another) makes, for these leaves."""
        (args, named), block = self.told, block or self.block
        heard: Leaves = {}
        with torch.enable_grad(), _cut(block, leaves, heard):
            made = block(*args, **named)
        return heard, hidden_of(made)

    def sources(self, values: Iterable[torch.Tensor], names: Sequence[str]) -> Leaves:
        """For layers whose leaves some of `values` depend on: which channels do (booleans)."""
        total = torch.zeros(())
        noise = torch.Generator().manual_seed(0)
        for value in values:  # a plain sum of what a norm makes would not depend on its input
            weights = torch.randn(value.shape, generator=noise).to(value.device)
            total = total + (value.float() * weights).sum().cpu()
        if not total.requires_grad:
            return {}
        slopes = torch.autograd.grad(
            total, [self.leaves[n] for n in names], allow_unused=True, retain_graph=True
        )
        found = {
            name: _any_position(slope, self.block.get_submodule(name)) != 0
            for name, slope in zip(names, slopes, strict=True)
            if slope is not None
        }
        return {name: channels for name, channels in found.items() if channels.any()}


def _any_position(values: torch.Tensor, layer: nn.Module) -> torch.Tensor:
    """The largest size over positions, by channel."""
    return values.detach().abs().movedim(kind_of(layer).channel_axis, 0).flatten(1).amax(1)


def _groups_of_block(block: nn.Module, told: Any, round_to: int) -> list[ChannelGroup]:
    """The groups of one block, under its own names; each was tried by removing its first units."""
    probe = _Probe(block, told)
    groups = []
    for makers, readers in _components(probe):
        if any(groups_of(block.get_submodule(name)) > 1 for name in (*makers, *readers)):
            continue
        reads = _Reads(probe, makers, readers)
        for couplings, heads in ((reads.hidden(), False), (reads.heads(), True)):
            units = len(couplings[-1].channel_P.unique()) if couplings else 0
            blocks = torch.arange(units).split(1 if heads else round_to)
            if len(blocks) > 1:
                group = ChannelGroup(makers[0], units, couplings, blocks, heads=heads)
                groups += _tried(probe, group, readers)
    return groups


def _components(probe: _Probe) -> list[tuple[list[str], list[str]]]:
    """Layers whose outputs only these others read, which read nothing else."""
    names = list(probe.heard)
    feeds = {name: set(probe.sources([probe.heard[name]], names)) for name in names}
    stream = set(probe.sources([probe.made], names))
    parts: list[tuple[set[str], set[str]]] = []
    for reader, makers in feeds.items():
        if not makers:
            continue
        joined = [part for part in parts if part[0] & makers]
        parts = [part for part in parts if part not in joined]
        parts.append(
            (makers.union(*(m for m, _ in joined)), {reader}.union(*(r for _, r in joined)))
        )
    return [
        ([n for n in names if n in makers], [n for n in names if n in readers])
        for makers, readers in parts
        if not makers & stream
    ]


class _Reads:
    """Which channels of makers each channel of the readers depends on, in one component."""

    def __init__(self, probe: _Probe, makers: Sequence[str], readers: Sequence[str]) -> None:
        self.probe, self.makers, self.readers = probe, makers, readers
        self.layers = {n: probe.block.get_submodule(n) for n in (*makers, *readers)}
        self.widths = [width_of(self.layers[name], "in") for name in readers]
        self.code, self.shared = self._codes()
        self.coupled_C = self._reached(self.shared)

    def hidden(self) -> tuple[Coupling, ...]:
        """Units of one reader's channel each, with makers of their own; numbered in turn."""
        unit_C = (~self.coupled_C).cumsum(0) - 1
        couplings = []
        for name, code in self.code.items():
            own = ~self.shared[name]
            own[own.clone()] &= ~self.coupled_C[code[own]]
            couplings.append(Coupling(name, "out", own.nonzero().flatten(), unit_C[code[own]]))
        return self._with_readers(couplings, ~self.coupled_C, unit_C)

    def heads(self) -> tuple[Coupling, ...]:
        """The other units: channels of readers that share makers, and all these makers."""
        if not self.coupled_C.any():
            return ()
        left_C, unit_C = self.coupled_C.clone(), torch.zeros_like(self.coupled_C, dtype=torch.long)
        places: dict[str, list[torch.Tensor]] = {name: [] for name in self.makers}
        unit = 0
        while left_C.any():
            if unit == MOST_HEADS:
                return ()
            own_C = torch.zeros_like(left_C)
            own_C[left_C.nonzero()[0]] = True
            while True:
                made = self._made_by(own_C)
                more_C = self._reached(made) | own_C
                if torch.equal(more_C, own_C):
                    break
                own_C = more_C
            for name, channels in made.items():
                places[name].append(channels.nonzero().flatten())
            unit_C[own_C] = unit
            left_C &= ~own_C
            unit += 1
        couplings = [
            Coupling(
                name,
                "out",
                torch.cat(parts),
                torch.cat([torch.full_like(part, k) for k, part in enumerate(parts)]),
            )
            for name, parts in places.items()
        ]
        return self._with_readers(couplings, self.coupled_C, unit_C)

    def _with_readers(
        self, couplings: list[Coupling], own_C: torch.Tensor, unit_C: torch.Tensor
    ) -> tuple[Coupling, ...]:
        for name, own, unit in zip(
            self.readers, own_C.split(self.widths), unit_C.split(self.widths), strict=True
        ):
            couplings.append(Coupling(name, "in", own.nonzero().flatten(), unit[own]))
        return tuple(c for c in couplings if len(c.index_P))

    def _codes(self) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """The one channel of the readers that each channel of a maker reaches, and which reach more.

        The channel's number is read off bit by bit: derivatives of all channels with that bit.
        """
        number_C = torch.arange(sum(self.widths))
        code = {
            n: torch.zeros(width_of(self.layers[n], "out"), dtype=torch.long) for n in self.makers
        }
        shared = {name: torch.zeros_like(c, dtype=torch.bool) for name, c in code.items()}
        for bit in range(max(1, (len(number_C) - 1).bit_length())):
            ones, zeros = (self._made_by((number_C >> bit & 1) == value) for value in (1, 0))
            for name in self.makers:
                code[name] += ones[name].long() << bit
                shared[name] |= ones[name] == zeros[name]  # both, or neither: it reaches nothing
        return code, shared

    def _made_by(self, own_C: torch.Tensor) -> dict[str, torch.Tensor]:
        """For each maker, the channels that some of these channels of the readers depend on."""
        own = zip(self.readers, own_C.split(self.widths), strict=True)
        heard = (
            _channels_last(self.probe.heard[n], self.layers[n])[..., c] for n, c in own if c.any()
        )
        found = self.probe.sources(heard, self.makers)
        none = {
            n: torch.zeros(width_of(self.layers[n], "out"), dtype=torch.bool) for n in self.makers
        }
        return none | {name: channels.cpu() for name, channels in found.items()}

    def _reached(self, made: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The channels of the readers that change when these channels of makers do."""
        if not any(bool(channels.any()) for channels in made.values()):
            return torch.zeros(sum(self.widths), dtype=torch.bool)
        leaves = dict(self.probe.leaves)
        noise = torch.Generator().manual_seed(1)
        for name, channels in made.items():
            moved = leaves[name].detach().clone()
            view = _channels_last(moved, self.layers[name])
            shape = view[..., channels].shape
            view[..., channels] = torch.randn(shape, generator=noise).to(view)
            leaves[name] = moved
        heard, _ = self.probe.hear(leaves)
        changed = []
        for name in self.readers:
            before, after = self.probe.heard[name].detach(), heard[name].detach()
            largest = _any_position(before, self.layers[name]).clamp_min(NEAR)
            changed.append(_any_position(after - before, self.layers[name]) > NEAR * largest)
        return torch.cat(changed).cpu()


def _channels_last(x: torch.Tensor, layer: nn.Module) -> torch.Tensor:
    return x.movedim(kind_of(layer).channel_axis, -1)


def _tried(probe: _Probe, group: ChannelGroup, readers: Sequence[str]) -> list[ChannelGroup]:
    """The group with the attributes that count its units, if removing every other block is exact.

    A copy of the block with narrower layers must hear what the block hears in the channels that stay:
    with attributes changed that count heads or repeat a width, the stream's names last, or with none.
    """
    gone = torch.cat(group.blocks[::2][: len(group.blocks) - 1])
    keep = {
        (c.layer, c.side): c.index_P[~torch.isin(c.channel_P, gone)].sort().values
        for c in group.couplings
    }
    likely, others = _counts(probe.block, group)
    for counts in (likely, {**likely, **others}, {}):
        if _is_exact(
            probe, replace(group, counts=counts), keep, group.channels - len(gone), readers
        ):
            return [replace(group, counts=counts)]
    return []


def _counts(block: nn.Module, group: ChannelGroup) -> tuple[Counts, Counts]:
    """Attributes that count heads or equal a width of the group, and such of the stream's names."""
    owners = {c.layer.rpartition(".")[0] for c in group.couplings} | {""}
    widths = {width_of(block.get_submodule(c.layer), c.side) for c in group.couplings}
    likely: dict[tuple[str, str], int] = {}
    others: dict[tuple[str, str], int] = {}
    for owner in owners:
        for name, value in attributes(block.get_submodule(owner)).items():
            heads = "head" in name and not re.search("dim|size|group", name)
            if value and value % group.channels == 0 and (heads or value in widths):
                found = others if STREAM.search(name) else likely
                found[owner, name] = value // group.channels
    return likely, others


def _is_exact(
    probe: _Probe,
    group: ChannelGroup,
    keep: Mapping[tuple[str, Side], torch.Tensor],
    left: int,
    readers: Sequence[str],
) -> bool:
    """Whether a copy of the block that keeps these positions hears what the block hears in them."""
    memo = {id(tensor): tensor for tensor in (*probe.block.parameters(), *probe.block.buffers())}
    try:
        narrow = deepcopy(probe.block, memo)  # of the same tensors: its layers are cut, too
    except RuntimeError:  # it keeps a state between calls
        return False
    leaves = dict(probe.leaves)
    for name in dict.fromkeys(layer for layer, _ in keep):
        layer = narrow.get_submodule(name)
        sides: tuple[Side, Side] = ("in", "out")
        kept = {side: keep.get((name, side)) for side in sides}
        own = [width_of(layer, s) if k is None else len(k) for s, k in kept.items()]
        if (out := kept["out"]) is not None:
            axis = kind_of(layer).channel_axis
            leaves[name] = leaves[name].detach().index_select(axis, out.to(leaves[name].device))
        set_layer_widths(layer, *own)
    for (owner, name), each in group.counts.items():
        setattr(narrow.get_submodule(owner), name, each * left)
    try:
        heard, _ = probe.hear(leaves, narrow)
    except Exception:  # it does not run with other widths, for whatever reason
        return False
    for name in readers:
        layer = probe.block.get_submodule(name)
        index = keep.get((name, "in"), torch.arange(width_of(layer, "in")))
        axis = kind_of(layer).channel_axis
        wanted = probe.heard[name].detach().index_select(axis, index.to(heard[name].device))
        near = max(NEAR, 4 * torch.finfo(wanted.dtype).eps)
        if heard[name].shape != wanted.shape or not torch.allclose(
            heard[name].detach(), wanted, rtol=near, atol=near
        ):
            return False
    return True
