"""Which channels of a UNet must be removed together, and in which blocks.

Torch-Pruning's dependency graph (Fang et al. 2023, arXiv:2301.12900) tells which positions of which
layers are coupled; nothing else of it is used. A *block* is the smallest set of channels that can be
removed without disturbing the others: whole norm groups (the statistics of the remaining norm groups
then stay exactly the same) and whole attention heads.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property
from math import gcd

import torch
import torch_pruning
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import FirDownsample2D
from diffusers.models.upsampling import FirUpsample2D
from torch import nn

from prunedm.architecture import Inputs, answer, architecture_of
from prunedm.errors import UserError
from prunedm.networks.layer_kinds import Side, find_kind, groups_of, kind_of, width_of
from prunedm.networks.layers import is_under

# The image's channels and the embedding's width are part of the model's interface.
_FIXED: frozenset[tuple[str, Side]] = frozenset(
    {("conv_out", "out"), ("conv_in", "in"), ("time_embedding.linear_2", "out")}
)


@dataclass(frozen=True)
class Coupling:
    """Positions `index_P` of one side of a layer belong to the group's channels `channel_P`."""

    layer: str
    side: Side  # a GroupNorm has only "out"
    index_P: torch.Tensor
    channel_P: torch.Tensor


Counts = Mapping[tuple[str, str], int]


@dataclass(frozen=True)
class ChannelGroup:
    """Channels 0..n-1 that the couplings share, and the blocks of channels that are removed whole.

    counts: attributes of modules that are this many times the number of channels.
    heads: whether the channels are heads of attention; each has several positions in its layers.
    """

    name: str  # the layer that makes these channels
    channels: int
    couplings: tuple[Coupling, ...]
    blocks: tuple[torch.Tensor, ...] = ()
    counts: Counts = field(default_factory=dict)
    heads: bool = False

    @cached_property
    def positions_by_block(self) -> list[dict[tuple[str, Side], int]]:
        """How many positions of each layer and side belong to each block."""
        return [
            {
                (coupling.layer, coupling.side): int(torch.isin(coupling.channel_P, block).sum())
                for coupling in self.couplings
            }
            for block in self.blocks
        ]


def channel_groups(
    denoiser: nn.Module,
    inputs: Inputs,
    *,
    protect: Iterable[str] | None = None,
    round_to: int = 4,
) -> list[ChannelGroup]:
    """Every coupled set of channels that may be removed, with its blocks.

    `protect`: patterns of modules whose shape must not change; None takes the architecture's.
    `round_to`: neighbouring blocks are merged to multiples of it, so widths stay multiples too.
    """
    protect = architecture_of(denoiser).protect if protect is None else protect
    free = free_groups(denoiser, inputs, protect=protect)
    cut = [_with_blocks(denoiser, group, round_to) for group in free]
    return [group for group in cut if len(group.blocks) > 1]


def free_groups(
    denoiser: nn.Module, inputs: Inputs, *, protect: Iterable[str] = ()
) -> list[ChannelGroup]:
    """Every coupled set outside the interface and `protect`, without blocks.

    Raises `UserError` for modules that cannot be narrowed, and where couplings are ambiguous.
    """
    for name, module in denoiser.named_modules():
        if isinstance(module, FirUpsample2D | FirDownsample2D):
            raise UserError(f"channels: {name} resamples by FIR filters, which cannot be narrowed")
        if isinstance(module, Attention) and module.fused_projections:
            raise UserError(
                f"channels: {name} has fused projections; unfuse_qkv_projections() first"
            )
    coupled = _coupled_channels(denoiser, inputs)
    _check_coverage(denoiser, coupled)
    protected = tuple(protect)
    return [group for group in coupled if _is_free(denoiser, group, protected)]


def _coupled_channels(denoiser: nn.Module, inputs: Inputs) -> list[ChannelGroup]:
    """All groups of the dependency graph, removable or not, without blocks."""
    copy = deepcopy(denoiser).requires_grad_(True)  # tracing needs gradients and changes modes
    graph = torch_pruning.DependencyGraph()
    with torch.enable_grad():
        graph.build_dependency(copy, dict(inputs), forward_fn=answer, verbose=False)
    names = {module: name for name, module in copy.named_modules()}
    roots = [m for m in graph.module2node if find_kind(m) is not None]
    # Convolutions first: the projection of scale_shift has two outputs for each of their channels.
    roots.sort(key=lambda m: not kind_of(m).axes)
    seen: set[tuple[str, Side]] = set()
    groups = []
    for root in roots:
        if (names[root], "out") in seen:
            continue
        group = _read_group(graph, root, names)
        seen |= {(coupling.layer, coupling.side) for coupling in group.couplings}
        groups.append(group)
    return groups


def _read_group(
    graph: torch_pruning.DependencyGraph, root: nn.Module, names: dict[nn.Module, str]
) -> ChannelGroup:
    channels = width_of(root, "out")
    prune = graph.get_pruner_of_module(root).prune_out_channels
    couplings = []
    for item in graph.get_pruning_group(root, prune, list(range(channels))):
        name = names.get(item.dep.target.module)
        if name is not None:  # else one of the graph's own nodes: an addition, a reshape
            side: Side = "out" if graph.is_out_channel_pruning_fn(item.dep.handler) else "in"
            index, channel = torch.tensor(item.idxs), torch.tensor(item.root_idxs)
            couplings.append(Coupling(name, side, index, channel))
    return ChannelGroup(names[root], channels, tuple(couplings))


def _check_coverage(denoiser: nn.Module, groups: Sequence[ChannelGroup]) -> None:
    """Raise `UserError` unless each position of a coupled layer belongs to exactly one group."""
    positions: dict[tuple[str, Side], list[torch.Tensor]] = defaultdict(list)
    for group in groups:
        for coupling in group.couplings:
            positions[coupling.layer, coupling.side].append(coupling.index_P)
    for (layer, side), found in positions.items():
        module = denoiser.get_submodule(layer)
        if not _has_channels(module):
            continue
        if torch.cat(found).sort().values.tolist() != list(range(width_of(module, side))):
            raise UserError(
                f"channels: cannot tell which channels the {side}puts of {layer} are coupled with"
            )


def _has_channels(module: nn.Module) -> bool:
    return isinstance(module, nn.GroupNorm) or find_kind(module) is not None


def _is_free(denoiser: nn.Module, group: ChannelGroup, protected: Sequence[str]) -> bool:
    for coupling in group.couplings:
        module = denoiser.get_submodule(coupling.layer)
        if not _has_channels(module) or groups_of(module) != 1:
            return False
        if (coupling.layer, coupling.side) in _FIXED or is_under(coupling.layer, protected):
            return False
    return True


def _with_blocks(denoiser: nn.Module, group: ChannelGroup, round_to: int) -> ChannelGroup:
    """Merge channels that share a norm group or a head, then neighbours up to `round_to`."""
    joined = torch.arange(group.channels)  # the smallest channel of the block each one is in
    for coupling in group.couplings:
        unit = _unit_size(denoiser, coupling)
        if unit > 1:
            joined = _join(joined, coupling.index_P // unit, coupling.channel_P)
    blocks = [torch.nonzero(joined == first).flatten() for first in joined.unique()]
    size = min(len(block) for block in blocks)
    step = round_to // gcd(round_to, size)
    merged = [torch.cat(blocks[i : i + step]) for i in range(0, len(blocks), step)]
    return ChannelGroup(group.name, group.channels, group.couplings, tuple(merged))


def _unit_size(denoiser: nn.Module, coupling: Coupling) -> int:
    """How many neighbouring positions must stay together here; 1 where any can go alone."""
    module = denoiser.get_submodule(coupling.layer)
    if isinstance(module, nn.GroupNorm):
        size = module.num_channels // module.num_groups
        # Norm groups that straddle two sources of a concatenation cannot be kept; the plan regroups.
        return size if are_whole(coupling.index_P, size) else 1
    parent = denoiser.get_submodule(coupling.layer.rpartition(".")[0])
    if isinstance(parent, Attention) and parent.heads > 1 and coupling.layer.endswith("to_q"):
        return width_of(module, "out") // parent.heads if coupling.side == "out" else 1
    return 1


def are_whole(index_P: torch.Tensor, size: int) -> bool:
    """Whether positions fill whole groups of `size` neighbours."""
    return bool(torch.isin(torch.bincount(index_P // size), torch.tensor([0, size])).all())


def _join(joined_C: torch.Tensor, unit_P: torch.Tensor, channel_P: torch.Tensor) -> torch.Tensor:
    """Merge the blocks that share a unit; a block is named by its smallest channel."""
    for unit in unit_P.unique():
        members = joined_C[channel_P[unit_P == unit]].unique()
        joined_C = torch.where(torch.isin(joined_C, members), members.min(), joined_C)
    return joined_C
