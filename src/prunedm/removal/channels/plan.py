"""Channel removal: from scores of weights to a plan of which channels stay, and the slicing.

    groups = channel_groups(denoiser, inputs)
    plan = plan_channels(denoiser, groups, scores=scores, ratio=0.3)
    remove_channels(denoiser, plan)

How many blocks to remove is searched from the widths alone (target.py).
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from diffusers.models.attention_processor import Attention
from torch import nn

from prunedm.errors import UserError
from prunedm.networks.layer_kinds import Side, width_of
from prunedm.networks.narrowed import Narrowed, as_narrowed
from prunedm.networks.widths import narrow_layer, sync_attributes
from prunedm.removal.channels.groups import ChannelGroup, are_whole
from prunedm.removal.channels.target import (
    Block,
    Cost,
    OutOfReach,
    count_params,
    even_blocks,
    lowest_blocks,
    planned_macs,
    removed_positions,
    same_share,
)

TargetKind = Literal["params", "macs", "channels"]
Reduction = Literal["sum", "mean", "max", "first"]

# couplings x channels => channels
_REDUCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "sum": lambda values_LC: values_LC.sum(0),
    "mean": lambda values_LC: values_LC.mean(0),
    "max": lambda values_LC: values_LC.amax(0),
    "first": lambda values_LC: values_LC[0],  # the layer that makes the channels
}


@dataclass(frozen=True)
class ChannelPlan:
    """Which positions stay, and the resulting sizes."""

    keep: dict[tuple[str, Side], torch.Tensor]  # ascending positions; untouched sides are absent
    norm_groups: dict[str, int]  # new num_groups, for every GroupNorm that gets narrower
    heads: dict[str, int]  # new heads, for every Attention whose inner width shrinks
    regrouped: tuple[str, ...]  # norms that lose parts of groups, so that their statistics change
    figures: dict[str, int | float] = field(default_factory=dict)
    counts: dict[tuple[str, str], int] = field(default_factory=dict)  # new values of attributes


def block_importance(
    group: ChannelGroup, scores: Mapping[str, torch.Tensor], *, reduction: Reduction = "mean"
) -> torch.Tensor:
    """One value per block, from the coupled layers' scores (weight-shaped, higher = keep).

    A layer's scores are averaged to one value per position and divided by that layer's mean, since
    layers of different fan-in have different scales; `reduction` combines the layers. Raises
    `UserError` where no coupled layer has a score.
    """
    rows = []
    for coupling in group.couplings:
        if coupling.layer in scores:
            score = scores[coupling.layer].detach().to("cpu", torch.float64)
            axis = 0 if coupling.side == "out" else 1
            # a signed score's effects cancel within a channel before their size counts
            value_P = score.mean([d for d in range(score.ndim) if d != axis]).abs()
            value_P = value_P / value_P.mean().clamp_min(torch.finfo(torch.float64).tiny)
            total = value_P.new_zeros(group.channels)
            total.index_add_(0, coupling.channel_P, value_P[coupling.index_P])
            rows.append(total / torch.bincount(coupling.channel_P, minlength=group.channels))
    if not rows:
        raise UserError(f"channels: no score for any layer coupled with {group.name}")
    importance_C = _REDUCTIONS[reduction](torch.stack(rows))
    return torch.stack([importance_C[block].mean() for block in group.blocks])


def plan_channels(
    denoiser: nn.Module,
    groups: Sequence[ChannelGroup],
    *,
    scores: Mapping[str, torch.Tensor],
    ratio: float,
    target_kind: TargetKind = "params",
    positions: Mapping[str, int] | None = None,
    macs: int | None = None,
    reduction: Reduction = "mean",
    max_ratio: float = 0.7,
    fits: Callable[[ChannelPlan], bool] | None = None,
) -> ChannelPlan:
    """Choose the blocks whose removal saves about the fraction `ratio` of the target.

    `positions` (from `layer_positions`) are needed for MACs, as the target or in the figures. macs:
    those of the whole network, where it does more than its layers and the attention of these groups.
    No group loses more than `max_ratio` of its blocks. `fits`: groups that are alike lose the same
    number of blocks, in the best of these ways that it accepts. Raises `UserError` where `ratio` is
    out of reach.
    """
    if not groups:
        raise OutOfReach(
            "channels: no layer has two blocks to choose from; a smaller round_to helps"
        )
    importances = [block_importance(group, scores, reduction=reduction) for group in groups]
    if target_kind == "channels" and ratio > max_ratio:
        raise UserError(f"at most {max_ratio:g} of a layer's channels can go; {ratio:g} was asked")
    count = None if positions is None else _macs_without(denoiser, groups, positions, macs)
    if target_kind == "channels" and fits is None:
        chosen = same_share(groups, importances, ratio=ratio, max_ratio=max_ratio)
        return _plan(denoiser, groups, chosen, count)
    cost: Cost = partial(count_params, denoiser)
    if target_kind == "macs":
        assert count is not None, "layer_positions() records them"
        cost = count
    if fits is None:
        chosen = lowest_blocks(groups, importances, ratio=ratio, max_ratio=max_ratio, cost=cost)
        return _plan(denoiser, groups, chosen, count)
    ways = even_blocks(
        groups,
        importances,
        ratio=ratio,
        max_ratio=max_ratio,
        cost=cost if target_kind != "channels" else None,
    )
    for chosen in ways:
        plan = _plan(denoiser, groups, chosen, count)
        if fits(plan):
            return plan
    raise OutOfReach(
        f"a ratio of {ratio:g}: none of {len(ways)} ways to give all blocks the same widths is one that "
        "the model's config can say; --loadable-by prunedm has no such limits"
    )


def _plan(
    denoiser: nn.Module,
    groups: Sequence[ChannelGroup],
    chosen: Sequence[Block],
    macs: Cost | None,
) -> ChannelPlan:
    """The plan that removes these blocks."""
    keep = _kept_positions(denoiser, groups, chosen)
    norm_groups, regrouped = _new_norm_groups(denoiser, keep)
    heads, figures = _new_heads(denoiser, keep), _figures(denoiser, groups, chosen, macs)
    return ChannelPlan(keep, norm_groups, heads, regrouped, figures, _new_counts(groups, chosen))


def remove_channels(denoiser: nn.Module, plan: ChannelPlan) -> None:
    """Slice the plan's layers in place, and set the width attributes that diffusers checks."""
    for name in dict.fromkeys(layer for layer, _ in plan.keep):
        module = denoiser.get_submodule(name)
        narrow_layer(module, plan.keep.get((name, "in")), plan.keep.get((name, "out")))
        if isinstance(module, nn.GroupNorm):
            module.num_groups = plan.norm_groups[name]
    for name, heads in plan.heads.items():
        _narrow_heads(denoiser.get_submodule(name), heads)
    for (name, attribute), count in plan.counts.items():
        setattr(denoiser.get_submodule(name), attribute, count)
    sync_attributes(denoiser)
    if isinstance(denoiser, Narrowed):  # else its config would describe the old widths
        as_narrowed(denoiser)


def _kept_positions(
    denoiser: nn.Module, groups: Sequence[ChannelGroup], chosen: Sequence[Block]
) -> dict[tuple[str, Side], torch.Tensor]:
    gone: dict[tuple[str, Side], list[torch.Tensor]] = defaultdict(list)
    for g, b in chosen:
        for coupling in groups[g].couplings:
            going = torch.isin(coupling.channel_P, groups[g].blocks[b])
            gone[coupling.layer, coupling.side].append(coupling.index_P[going])
    keep = {}
    for (layer, side), removed in gone.items():
        stays = torch.ones(width_of(denoiser.get_submodule(layer), side), dtype=torch.bool)
        stays[torch.cat(removed)] = False
        keep[layer, side] = stays.nonzero().flatten()
    return keep


def _new_norm_groups(
    denoiser: nn.Module, keep: Mapping[tuple[str, Side], torch.Tensor]
) -> tuple[dict[str, int], tuple[str, ...]]:
    """New `num_groups` by norm, and the norms that lose parts of groups."""
    groups, regrouped = {}, []
    for (name, _), kept in keep.items():
        norm = denoiser.get_submodule(name)
        if isinstance(norm, nn.GroupNorm):
            size = norm.num_channels // norm.num_groups
            if are_whole(kept, size):
                groups[name] = len(kept) // size
            else:
                sizes = [s for s in range(1, len(kept) + 1) if len(kept) % s == 0]
                groups[name] = len(kept) // min((abs(s - size), s) for s in sizes)[1]
                regrouped.append(name)
    return groups, tuple(regrouped)


def _new_heads(
    denoiser: nn.Module, keep: Mapping[tuple[str, Side], torch.Tensor]
) -> dict[str, int]:
    """New head counts: of several heads whole ones are removed; a single one gets narrower."""
    heads = {}
    for name, module in denoiser.named_modules():
        kept = keep.get((f"{name}.to_q", "out"))
        if isinstance(module, Attention) and kept is not None:
            old_inner = width_of(module.to_q, "out")
            heads[name] = len(kept) * module.heads // old_inner if module.heads > 1 else 1
    return heads


def _new_counts(
    groups: Sequence[ChannelGroup], chosen: Sequence[Block]
) -> dict[tuple[str, str], int]:
    """New values of the attributes that count a group's channels, where some go."""
    gone = Counter[int]()
    for g, b in chosen:
        gone[g] += len(groups[g].blocks[b])
    return {
        where: each * (groups[g].channels - count)
        for g, count in gone.items()
        for where, each in groups[g].counts.items()
    }


def _macs_without(
    denoiser: nn.Module,
    groups: Sequence[ChannelGroup],
    positions: Mapping[str, int],
    total: int | None,
) -> Cost:
    """The MACs that are left when positions are removed; those not planned stay as they are."""
    planned: Cost = partial(planned_macs, denoiser, positions, readers=_readers(groups))
    rest = 0 if total is None else total - planned({})
    return lambda removed: planned(removed) + rest


def _readers(groups: Sequence[ChannelGroup]) -> list[str]:
    """The layers that read the heads' outputs."""
    return [c.layer for group in groups if group.heads for c in group.couplings if c.side == "in"]


def _figures(
    denoiser: nn.Module,
    groups: Sequence[ChannelGroup],
    chosen: Sequence[Block],
    macs: Cost | None,
) -> dict[str, int | float]:
    removed = removed_positions(groups, chosen)
    channels = sum(group.channels for group in groups)
    left = channels - sum(len(groups[g].blocks[b]) for g, b in chosen)
    params = (count_params(denoiser), count_params(denoiser, removed))
    pairs = {"params": params, "channels": (channels, left)}
    if macs is not None:
        pairs["macs"] = (macs({}), macs(removed))
    figures: dict[str, int | float] = {}
    for kind, (before, after) in pairs.items():
        figures |= {f"{kind}_before": before, f"{kind}_after": after}
        figures[f"{kind}_removed"] = 1 - after / before
    return figures


@torch.no_grad()
def _narrow_heads(attention: Attention, heads: int) -> None:
    """Set the head count; to_q absorbs the change of 1/sqrt(head_dim), so q.k keeps its scale."""
    old_dim, new_dim = attention.inner_dim // attention.heads, attention.to_q.out_features // heads
    attention.heads = heads
    if new_dim != old_dim:
        for parameter in attention.to_q.parameters():
            parameter.mul_(math.sqrt(new_dim / old_dim))
