"""Which blocks of channels to remove so that the removed share meets a target.

Blocks of all groups are ranked together and the lowest are removed until the target is met. Blocks
differ in cost: where the next one would overshoot, smaller ones further up the ranking fill the gap.
The cost of a UNet of given widths is computed from its layers, without running or changing it.
"""

import math
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from diffusers.models.attention_processor import Attention
from torch import nn

from prunedm.errors import UserError
from prunedm.networks.layer_kinds import Side, find_kind, groups_of, weight_of, width_of
from prunedm.removal.channels.groups import ChannelGroup

Removed = Mapping[tuple[str, Side], int]  # positions that are removed, by layer and side
Block = tuple[int, int]  # group, block within it
Cost = Callable[[Removed], int]
NEAR = 0.005  # relative distance from the target at which the search stops
FAR = 0.05  # and that is accepted where all blocks are alike


class OutOfReach(UserError):
    """No choice of these blocks comes near the target; smaller blocks might."""


def lowest_blocks(
    groups: Sequence[ChannelGroup],
    importances: Sequence[torch.Tensor],
    *,
    ratio: float,
    max_ratio: float,
    cost: Cost,
) -> list[Block]:
    """Blocks of low importance whose removal saves about `ratio` of the cost.

    Raises `OutOfReach` where all removable blocks are too few, or a single block is too much.
    """
    ranked = _ranked(importances, max_ratio)
    dense = cost({})

    def share(blocks: Iterable[Block]) -> float:
        return 1 - cost(removed_positions(groups, blocks)) / dense

    most = share(ranked)
    if most < ratio * (1 - NEAR):
        reachable = math.floor(1000 * most) / 1000
        raise OutOfReach(
            f"a ratio of {ratio:g} cannot be reached: {reachable:g} is the largest here; "
            "a smaller --round-to or a larger --max-layer-ratio gives more"
        )
    heads = range(len(ranked) + 1)
    k = bisect_right(heads, ratio, key=lambda n: share(ranked[:n])) - 1
    chosen = min(ranked[:k], ranked[: k + 1], key=lambda blocks: abs(share(blocks) - ratio))
    if abs(share(chosen) - ratio) > NEAR * ratio:
        chosen = _filled(ranked, k, share=share, ratio=ratio)
    if not chosen:
        step = share(ranked[:1])
        raise OutOfReach(
            f"a ratio of {ratio:g} is less than one block, which is {step:.2g}; ask for more"
        )
    return chosen


def same_share(
    groups: Sequence[ChannelGroup],
    importances: Sequence[torch.Tensor],
    *,
    ratio: float,
    max_ratio: float,
) -> list[Block]:
    """The lowest blocks of each group: about `ratio` of its channels, and of all channels together.

    Raises `OutOfReach` where blocks are so large that none would be removed.
    """
    order = [importance_B.argsort(stable=True).tolist() for importance_B in importances]
    wanted = [ratio * len(group.blocks) for group in groups]
    counts = [min(int(w), _allowed(len(o), max_ratio)) for w, o in zip(wanted, order, strict=True)]
    total = ratio * sum(group.channels for group in groups)

    def gone(g: int, count: int) -> int:
        return sum(len(groups[g].blocks[b]) for b in order[g][:count])

    missing = total - sum(gone(g, count) for g, count in enumerate(counts))
    for g in sorted(
        range(len(groups)), key=lambda g: counts[g] - wanted[g]
    ):  # largest remainder first
        step = gone(g, counts[g] + 1) - gone(g, counts[g])
        if counts[g] < _allowed(len(order[g]), max_ratio) and abs(missing - step) < abs(missing):
            counts[g] += 1
            missing -= step
    if not any(counts):
        raise OutOfReach(f"a ratio of {ratio:g} is less than one block of any layer; ask for more")
    return [(g, b) for g, count in enumerate(counts) for b in order[g][:count]]


def even_blocks(
    groups: Sequence[ChannelGroup],
    importances: Sequence[torch.Tensor],
    *,
    ratio: float,
    max_ratio: float,
    cost: Cost | None,
) -> list[list[Block]]:
    """Ways to remove about `ratio` of the cost in which groups that are alike lose equally many blocks.

    All groups of heads lose one share of their blocks and all others another; without a cost, both
    are `ratio`. The way that loses the least comes first. Raises `OutOfReach` where none is near.
    """
    order = [importance_B.argsort(stable=True).tolist() for importance_B in importances]
    sizes = [max((len(g.blocks) for g in groups if g.heads == kind), default=0) for kind in (1, 0)]

    def chosen(*gone: int) -> list[Block]:
        """Blocks of all groups where the largest ones of either kind lose so many."""
        blocks = []
        for g, group in enumerate(groups):
            kind, own = 0 if group.heads else 1, order[g]
            count = min(gone[kind] * len(own) // sizes[kind], _allowed(len(own), max_ratio))
            blocks += [(g, b) for b in own[:count]]
        return blocks

    if cost is None:
        heads = sorted(range(sizes[0] + 1), key=lambda n: abs(n - ratio * sizes[0]))
        found = [chosen(n, round(ratio * sizes[1])) for n in heads]
        return [blocks for blocks in found if blocks]
    dense = cost({})

    def share(blocks: Iterable[Block]) -> float:
        return 1 - cost(removed_positions(groups, blocks)) / dense

    def nearest(heads: int) -> list[Block]:
        counts = range(sizes[1] + 1)
        k = bisect_left(counts, ratio, key=lambda n: share(chosen(heads, n)))
        some = [chosen(heads, n) for n in (k - 1, k) if n in counts]
        return min(some, key=lambda blocks: abs(share(blocks) - ratio))

    ways = [nearest(heads) for heads in range(sizes[0] + 1)]
    ways = [blocks for blocks in ways if blocks and abs(share(blocks) - ratio) <= FAR * ratio]
    if not ways:
        most = math.floor(1000 * share(chosen(*sizes))) / 1000
        raise OutOfReach(
            f"a ratio of {ratio:g} cannot be reached with the same widths in all blocks; they can lose "
            f"{most:g} at most, in steps of whole heads and multiples of --round-to"
        )
    each = [share([(g, 0)]) for g in range(len(groups))]
    return sorted(ways, key=lambda way: sum(each[g] * float(importances[g][b]) for g, b in way))


def removed_positions(groups: Sequence[ChannelGroup], blocks: Iterable[Block]) -> Removed:
    """How many positions of each layer and side these blocks remove."""
    removed: Counter[tuple[str, Side]] = Counter()
    for g, b in blocks:
        removed.update(groups[g].positions_by_block[b])
    return removed


def count_params(denoiser: nn.Module, removed: Removed | None = None) -> int:
    """Parameters of the denoiser that remain without the positions `removed`."""
    total = sum(parameter.numel() for parameter in denoiser.parameters())
    gone = removed or {}
    for name in dict.fromkeys(layer for layer, _ in gone):
        module = denoiser.get_submodule(name)
        total -= sum(parameter.numel() for parameter in module.parameters())
        total += _weights(module, name, gone)
        total += _outputs(module, name, gone) * (module.bias is not None)
    return total


def planned_macs(
    denoiser: nn.Module,
    positions: Mapping[str, int],
    removed: Removed | None = None,
    *,
    readers: Iterable[str] = (),
) -> int:
    """Multiply-accumulates of layers and attention without the positions `removed`, for one image.

    `positions` are those of `layer_positions`. Computed, since a search over widths cannot run each
    candidate; `evaluation.size.count_macs` counts the operations of a run. readers: layers that read
    the outputs of attention over all positions, where its class is not diffusers' `Attention`.
    """
    gone, total = removed or {}, 0
    for name in readers:
        inner = width_of(denoiser.get_submodule(name), "in") - gone.get((name, "in"), 0)
        total += 2 * inner * positions[name] ** 2
    for name, module in denoiser.named_modules():
        if find_kind(module) is not None:
            total += _weights(module, name, gone) * positions[name]
        elif isinstance(module, Attention):
            inner = _outputs(module.to_q, f"{name}.to_q", gone)
            total += 2 * inner * positions[f"{name}.to_q"] * positions[f"{name}.to_k"]
    return total


def _filled(
    ranked: Sequence[Block], k: int, *, share: Callable[[Iterable[Block]], float], ratio: float
) -> list[Block]:
    """The first k blocks and later ones that still fit, or the first k + 1 where that is nearer."""
    chosen, over = list(ranked[:k]), list(ranked[: k + 1])
    missing = ratio - share(chosen)
    for block in ranked[k + 1 :]:
        left = ratio - share([*chosen, block])
        if left >= -NEAR * ratio:
            chosen.append(block)
            missing = left
        if abs(missing) <= NEAR * ratio:
            return chosen
    return over if abs(share(over) - ratio) < abs(missing) else chosen


def _allowed(blocks: int, max_ratio: float) -> int:
    return min(int(max_ratio * blocks + 1e-9), blocks - 1)


def _ranked(importances: Sequence[torch.Tensor], max_ratio: float) -> list[Block]:
    """Removable blocks, least important first."""
    entries = []
    for g, importance_B in enumerate(importances):
        order = importance_B.argsort(stable=True)[: _allowed(len(importance_B), max_ratio)]
        entries += [(float(importance_B[b]), g, b) for b in order.tolist()]
    return [(g, b) for _, g, b in sorted(entries)]


def _outputs(module: nn.Module, name: str, removed: Removed) -> int:
    return width_of(module, "out") - removed.get((name, "out"), 0)


def _weights(module: nn.Module, name: str, removed: Removed) -> int:
    if isinstance(module, nn.GroupNorm):
        return _outputs(module, name, removed) * module.affine
    inputs = width_of(module, "in") - removed.get((name, "in"), 0)
    taps = weight_of(module)[0, 0].numel()
    return _outputs(module, name, removed) * inputs * taps // groups_of(module)
