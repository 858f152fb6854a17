"""Channel permutation before N:M pruning (Pool & Yu 2021, "Channel permutations for N:M sparsity").

    permutation = find_permutation(denoiser, inputs, scores, patterns)
    permute_(denoiser, permutation)
    scores = permuted(scores, permutation)

Channels are reordered wherever they are coupled, so the denoiser computes the same function, while
the N:M groups of the layers that read them keep more score (the search is in `stripes`).

Norm groups and attention heads must stay whole. A *cell* is a set of channels that are in the same
group of every norm and the same head of every attention. Single channels move within their cell;
cells of equal size swap where each norm has both as whole groups, or both inside one group. A cell
of one stripe leaves no choice: norm groups of M channels gain nothing.

Not reordered: the interface as in channel removal (the image's channels, the output of the time
embedding and so the inputs of all `time_emb_proj`), and channels that share a stripe with channels of
another set. Cells of M or more channels, and cells split over stripes, are not swapped whole.

C channels, or their slots; K copies of them in one layer's input; P positions; L norms and heads;
Z cells.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from diffusers.models.attention_processor import Attention
from torch import nn

from prunedm.architecture import Inputs
from prunedm.errors import UserError
from prunedm.masks import Pattern
from prunedm.networks.layer_kinds import Side, find_kind, oriented, weight_of, width_of
from prunedm.networks.layers import to_groups, why_not_nm
from prunedm.removal.channels.groups import ChannelGroup, free_groups
from prunedm.removal.stripes import View, best_content, kept_score, stripe_homes


@dataclass(frozen=True)
class Permutation:
    """New position -> old position by layer and side, and the gain of each coupled set.

    `kept`: the score that N:M masks keep before and after, by the layer that makes the channels, as
    shares of the total score of each layer that reads them, summed over these layers.
    """

    order: dict[tuple[str, Side], torch.Tensor]  # unchanged sides may be absent
    kept: dict[str, tuple[float, float]]


def find_permutation(
    denoiser: nn.Module,
    inputs: Inputs,
    scores: Mapping[str, torch.Tensor],
    patterns: Mapping[str, Pattern],
) -> Permutation:
    """A permutation that raises the score kept by the `patterns` of these layers (local optimum).

    `scores`: weight-shaped, for at least the layers in `patterns`; absolute values, divided by the
    layer's sum, since most scores do not compare across layers: otherwise the layer with the largest
    would decide for a whole residual stream. A single layer may keep less while the sum rises.
    Deterministic; `denoiser` is not changed. Raises `UserError` where a pattern does not fit its
    layer or a score is missing or has another shape.
    """
    rows = {name: _normalised_rows(denoiser, name, scores, p) for name, p in patterns.items()}
    order: dict[tuple[str, Side], torch.Tensor] = {}
    kept: dict[str, tuple[float, float]] = {}
    groups = free_groups(denoiser, inputs)
    for group in groups:
        places = _places(group)
        views = _views(places, rows, patterns)
        if not views:
            continue
        content_C = best_content(views, *_cells(denoiser, places))
        start_C = torch.arange(group.channels)
        kept[group.name] = (kept_score(views, start_C), kept_score(views, content_C))
        if not torch.equal(content_C, start_C):
            for (name, side), place_KC in places.items():
                whole = torch.arange(width_of(denoiser.get_submodule(name), side))
                whole = order.setdefault((name, side), whole)
                whole[place_KC] = place_KC[:, content_C]
    return Permutation(order, kept)


@torch.no_grad()
def permute_(denoiser: nn.Module, permutation: Permutation) -> None:
    """Reorder the parameters in place. Raises `UserError` where the model has other widths."""
    for (name, side), order in permutation.order.items():
        module = dict(denoiser.named_modules()).get(name)
        if module is None or width_of(module, side) != len(order):
            raise UserError(f"permutation of another model: {name} has no {len(order)} {side}puts")
    for name in dict.fromkeys(layer for layer, _ in permutation.order):
        module = denoiser.get_submodule(name)
        for parameter in module.parameters(recurse=False):
            value = oriented(module, parameter)
            value.copy_(_reordered(value, name, permutation))


def permuted(
    by_layer: Mapping[str, torch.Tensor], permutation: Permutation
) -> dict[str, torch.Tensor]:
    """Weight-shaped tensors by layer (scores, masks) in the order that `permute_` gives weights."""
    return {name: _reordered(value, name, permutation) for name, value in by_layer.items()}


def _reordered(value: torch.Tensor, name: str, permutation: Permutation) -> torch.Tensor:
    sides: tuple[Side, ...] = ("out", "in")  # the first two axes of a weight; a bias has one
    for axis, side in enumerate(sides[: value.ndim]):
        order = permutation.order.get((name, side))
        if order is not None:
            value = value.index_select(axis, order.to(value.device))
    return value


def _normalised_rows(
    denoiser: nn.Module, name: str, scores: Mapping[str, torch.Tensor], pattern: Pattern
) -> torch.Tensor:
    """The layer's absolute score as (rows, input channels), with sum one."""
    layer = dict(denoiser.named_modules()).get(name)
    if layer is None or find_kind(layer) is None:
        raise UserError(f"pattern {pattern} is for {name!r}, which is not a layer of this model")
    if reason := why_not_nm(layer, pattern.m):
        raise UserError(f"pattern {pattern} does not fit {name}: {reason}")
    score, shape = scores.get(name), weight_of(layer).shape
    if score is None or score.shape != shape:
        found = "no score" if score is None else f"a score of shape {tuple(score.shape)}"
        raise UserError(f"{name} has {found}; its weight is {tuple(shape)}")
    score = score.detach().to("cpu", torch.float64).abs()
    total = score.sum().clamp_min(torch.finfo(torch.float64).tiny)
    return to_groups(score / total, score.shape[1])


def _places(group: ChannelGroup) -> dict[tuple[str, Side], torch.Tensor]:
    """The position of copy k of channel c, (K, C), by layer and side.

    Empty where some layer does not have whole copies: the channels then cannot be moved.
    """
    found: dict[tuple[str, Side], list[tuple[torch.Tensor, torch.Tensor]]] = defaultdict(list)
    for coupling in group.couplings:
        found[coupling.layer, coupling.side].append((coupling.index_P, coupling.channel_P))
    places = {}
    for key, parts in found.items():
        index_P = torch.cat([index for index, _ in parts])
        ascending_P = index_P.argsort()
        channel_P = torch.cat([channel for _, channel in parts])[ascending_P]
        if len(channel_P) % group.channels:
            return {}
        channel_KC = channel_P.reshape(-1, group.channels)
        if not bool((channel_KC.sort(1).values == torch.arange(group.channels)).all()):
            return {}
        place_KC = index_P[ascending_P].reshape(-1, group.channels)
        places[key] = place_KC.gather(1, channel_KC.argsort(1))
    return places


def _views(
    places: Mapping[tuple[str, Side], torch.Tensor],
    rows: Mapping[str, torch.Tensor],
    patterns: Mapping[str, Pattern],
) -> list[View]:
    """Views of the inputs with a pattern; inputs with equal pattern and stripes share one."""
    found: dict[tuple[Pattern, tuple[int, ...]], list[torch.Tensor]] = defaultdict(list)
    for (name, side), place_KC in places.items():
        if side == "in" and name in patterns:
            for place_C in place_KC:
                home_C = stripe_homes(place_C, patterns[name].m)
                columns_RC = rows[name][:, place_C]
                found[patterns[name], tuple(home_C.tolist())].append(columns_RC)
    views = []
    for (pattern, home), parts in found.items():
        views.append(View(pattern, torch.cat(parts), torch.tensor(home)))
    return views


def _cells(
    denoiser: nn.Module, places: Mapping[tuple[str, Side], torch.Tensor]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Slots of each cell, and families (cells, U) of cells that may swap with each other."""
    channels = next(iter(places.values())).shape[1]
    seen, sizes = [torch.zeros(channels, dtype=torch.long)], [channels]
    for (name, side), place_KC in places.items():
        size = _indivisible(denoiser, name, side)
        seen += [place_C // size for place_C in place_KC if size > 0]
        sizes += [size for _ in place_KC if size > 0]
    part_LC = torch.stack(seen)  # the norm group or head of each channel, by norm or head
    parts_LZ, cell_C = part_LC.unique(dim=1, return_inverse=True)
    cells = [(cell_C == z).nonzero().flatten() for z in range(parts_LZ.shape[1])]
    families: dict[tuple[int, ...], list[torch.Tensor]] = defaultdict(list)
    for cell, parts in zip(cells, parts_LZ.T.tolist(), strict=True):
        # -1: the cell is a whole norm group, and may become another whole group
        key = [-1 if size == len(cell) else part for part, size in zip(parts, sizes, strict=True)]
        families[(len(cell), *key)].append(cell)
    return cells, [torch.stack(family) for family in families.values()]


def _indivisible(denoiser: nn.Module, name: str, side: Side) -> int:
    """Number of neighbouring positions in a norm group or head here; 0 without either."""
    module = denoiser.get_submodule(name)
    if isinstance(module, nn.GroupNorm):
        return module.num_channels // module.num_groups
    parent = denoiser.get_submodule(name.rpartition(".")[0])
    projects = name.rpartition(".")[2] in ("to_q", "to_k", "to_v") and side == "out"
    if isinstance(parent, Attention) and projects:
        return width_of(module, "out") // parent.heads
    return 0
