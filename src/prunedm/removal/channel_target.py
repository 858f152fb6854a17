"""Which blocks of channels go, so that the share removed is the one that was asked for.

Blocks of all groups are ranked together and the lowest go, until the target is met. Blocks differ in
what they cost: where the next one would be too much, smaller ones further up the ranking fill the rest.
"""

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import torch

from prunedm.errors import UserError
from prunedm.removal.channel_costs import Removed, Side
from prunedm.removal.channel_groups import ChannelGroup

Block = tuple[int, int]  # group, block within it
Cost = Callable[[Removed], int]
NEAR = 0.005  # of the target: near enough to stop looking


class OutOfReach(UserError):
    """No choice of these blocks removes about what was asked for; smaller blocks might."""


def lowest_blocks(
    groups: Sequence[ChannelGroup],
    importances: Sequence[torch.Tensor],
    *,
    ratio: float,
    max_ratio: float,
    cost: Cost,
) -> list[Block]:
    """Blocks of low importance whose removal takes about `ratio` of the cost.

    Raises `UserError` where all that may go are too few, or a single block is too much.
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
    """The lowest blocks of each group, as near to `ratio` of its channels as they and the sum allow.

    Raises `UserError` where blocks are so large that nothing would go.
    """
    order = [importance_B.argsort(stable=True).tolist() for importance_B in importances]
    wanted = [ratio * len(group.blocks) for group in groups]
    counts = [min(int(w), _allowed(len(o), max_ratio)) for w, o in zip(wanted, order, strict=True)]
    total = ratio * sum(group.channels for group in groups)

    def gone(g: int, count: int) -> int:
        return sum(len(groups[g].blocks[b]) for b in order[g][:count])

    missing = total - sum(gone(g, count) for g, count in enumerate(counts))
    for g in sorted(range(len(groups)), key=lambda g: counts[g] - wanted[g]):  # largest rest first
        step = gone(g, counts[g] + 1) - gone(g, counts[g])
        if counts[g] < _allowed(len(order[g]), max_ratio) and abs(missing - step) < abs(missing):
            counts[g] += 1
            missing -= step
    if not any(counts):
        raise OutOfReach(f"a ratio of {ratio:g} is less than one block of any layer; ask for more")
    return [(g, b) for g, count in enumerate(counts) for b in order[g][:count]]


def removed_positions(groups: Sequence[ChannelGroup], blocks: Iterable[Block]) -> Removed:
    """How many positions of each layer and side go with these blocks."""
    removed: Counter[tuple[str, Side]] = Counter()
    for g, b in blocks:
        removed.update(groups[g].positions_by_block[b])
    return removed


def _filled(
    ranked: Sequence[Block], k: int, *, share: Callable[[Iterable[Block]], float], ratio: float
) -> list[Block]:
    """The first k blocks, and those further up that still fit; or k + 1 where that is nearer."""
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
    """Blocks that may go, least important first."""
    entries = []
    for g, importance_B in enumerate(importances):
        order = importance_B.argsort(stable=True)[: _allowed(len(importance_B), max_ratio)]
        entries += [(float(importance_B[b]), g, b) for b in order.tolist()]
    return [(g, b) for _, g, b in sorted(entries)]
