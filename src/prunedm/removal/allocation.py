"""How much each layer is pruned: a knapsack over measured losses (SPDY, Frantar & Alistarh 2022).

Each layer takes one choice: an N:M pattern, a share of its weights removed, or dense. The loss of a
choice is measured; the best assignment under a budget of weights or MACs comes from the list of
undominated (cost, loss) pairs (Nemhauser & Ullmann 1969), whose costs stay exact.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf, isfinite
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from prunedm.architecture import device_of
from prunedm.errors import UserError
from prunedm.evaluation.loss import denoising_loss
from prunedm.masks import Masks, Pattern
from prunedm.networks.layers import why_not_nm
from prunedm.progress import Progress, Silent
from prunedm.task import Batch, predict

Choice: TypeAlias = Pattern | float | None
"""N:M, the share of the layer's weights removed, or None for dense."""

MasksFor: TypeAlias = Callable[[str, Choice], torch.Tensor]
"""The mask of a layer, by name, under a choice that is not dense."""

RESOLUTION = 20_000  # undominated pairs kept after each layer

Floats: TypeAlias = NDArray[np.float64]


def kept_share(choice: Choice) -> float:
    """Share of a layer's weights that stay. Raises `UserError` for a ratio outside 0..1."""
    if choice is None:
        return 1.0
    if isinstance(choice, Pattern):
        return choice.n / choice.m
    if not 0 <= choice <= 1:
        raise UserError(f"ratio {choice} is not between 0 and 1; try 0.5")
    return 1.0 - choice


def fitting(
    layers: Mapping[str, nn.Module], choices: Sequence[Choice]
) -> dict[str, tuple[Choice, ...]]:
    """Each layer's candidates: the choices that fit it, or dense alone where none does."""
    return {
        name: tuple(c for c in choices if _why_not(layer, c) is None) or (None,)
        for name, layer in layers.items()
    }


def weight_costs(
    layers: Mapping[str, nn.Module],
    candidates: Mapping[str, Sequence[Choice]],
    positions: Mapping[str, int] | None = None,
) -> dict[str, dict[Choice, float]]:
    """Weights kept by each candidate; with the layers' output positions, the MACs they cost.

    Raises `UserError` for a pattern that does not fit its layer.
    """
    costs: dict[str, dict[Choice, float]] = {}
    for name, choices in candidates.items():
        each = 1 if positions is None else positions[name]
        costs[name] = {choice: each * _kept(name, layers[name], choice) for choice in choices}
    return costs


@torch.no_grad()
def dense_targets(denoiser: nn.Module, batches: Sequence[Batch]) -> list[Batch]:
    """The same problems with the denoiser's own output as target.

    `sensitivities` on them are squared distances to the dense output: never negative, and without
    the cross term with the dense error, which is most of the noise of a data loss.
    """
    device = device_of(denoiser)
    was_training = denoiser.training
    denoiser.eval()
    outputs = [predict(denoiser, batch.to(device)).to(batch.target.device) for batch in batches]
    denoiser.train(was_training)
    return [replace(b, target=out) for b, out in zip(batches, outputs, strict=True)]


@torch.no_grad()
def sensitivities(
    denoiser: nn.Module,
    layers: Mapping[str, nn.Module],
    masks_for: MasksFor,
    candidates: Mapping[str, Sequence[Choice]],
    *,
    batches: Sequence[Batch],
    progress: Progress | None = None,
) -> dict[str, dict[Choice, float]]:
    """Increase of the mean denoising loss when one layer alone is pruned by one choice.

    All choices see the same problems, so the problems' own noise cancels. Each costs one pass over
    `batches`; a choice that removes nothing is 0 by definition. The weights are restored bit for
    bit, also after an interruption.
    """
    device = device_of(denoiser)
    held = [batch.to(device) for batch in batches]
    passes = 1 + sum(kept_share(c) < 1 for choices in candidates.values() for c in choices)
    losses: dict[str, dict[Choice, float]] = {}
    with (progress or Silent()).task("sensitivity", passes) as bar:
        dense = denoising_loss(denoiser, held, device=device).mean
        bar.advance()
        for name, choices in candidates.items():
            losses[name] = {}
            for choice in choices:
                if kept_share(choice) == 1:
                    losses[name][choice] = 0.0
                    continue
                with Masks({name: masks_for(name, choice)}).applied(denoiser):
                    loss = denoising_loss(denoiser, held, device=device).mean
                losses[name][choice] = loss - dense
                bar.advance(note=f"{name} {choice} {loss - dense:+.2g}")
    return losses


def allocate(
    losses: Mapping[str, Mapping[Choice, float]],
    costs: Mapping[str, Mapping[Choice, float]],
    budget: float,
) -> dict[str, Choice]:
    """One choice a layer: the least sum of losses whose sum of costs is at most `budget`.

    The loss of a choice is raised to 0 or to that of any costlier choice of its layer: removing more
    weights helps only by chance, from the noise of few problems. Among choices of equal loss the
    costlier is taken where the budget allows.

    The sum is optimal as long as `RESOLUTION` undominated pairs describe all assignments
    (whole-number costs with a large common divisor). Beyond that it is at most the optimum of a
    budget smaller by layers / RESOLUTION of the costs' range; costs are never rounded.

    Raises `UserError` where the cheapest choices exceed the budget, or a loss is not finite.
    """
    assert losses.keys() == costs.keys()
    layers = [_options(name, losses[name], costs[name]) for name in costs]
    _check_budget(layers, budget)
    picks = _fill(layers, _knapsack(layers, budget), budget)
    return {name: layer.choices[k] for name, layer, k in zip(costs, layers, picks, strict=True)}


@dataclass(frozen=True)
class _Options:
    """One layer's K choices, by cost; `loss_K` falls with the cost."""

    choices: tuple[Choice, ...]
    cost_K: Floats
    loss_K: Floats


def _options(name: str, loss: Mapping[Choice, float], cost: Mapping[Choice, float]) -> _Options:
    assert loss.keys() == cost.keys(), name
    assert loss, name
    for choice, value in loss.items():
        if not isfinite(value):
            raise UserError(
                f"the loss with {name} pruned by {choice} is {value}; leave this choice out"
            )
    choices = tuple(sorted(cost, key=lambda choice: cost[choice]))
    # equal costs (2:4 and 4:8) do not bound each other
    counted = [
        max([0.0] + [loss[d] for d in choices if d == c or cost[d] > cost[c]]) for c in choices
    ]
    return _Options(
        choices, np.array([cost[c] for c in choices], np.float64), np.array(counted, np.float64)
    )


def _check_budget(layers: Sequence[_Options], budget: float) -> None:
    least = sum(float(layer.cost_K[0]) for layer in layers)
    if least <= budget:
        return
    most = sum(float(layer.cost_K[-1]) for layer in layers)
    raise UserError(
        f"the sparsest choices cost {least / most:.4f} of the densest ones, more than the budget's "
        f"{budget / most:.4f}; ask for a share of at least {least / most:.4f}, or add sparser choices"
    )


def _knapsack(layers: Sequence[_Options], budget: float) -> list[int]:
    """The choice of each layer in the best assignment found, as indices into its options."""
    cheapest = [float(layer.cost_K[0]) for layer in layers]
    cost_F, loss_F = np.zeros(1), np.zeros(1)  # F undominated assignments of the layers so far
    trail: list[tuple[NDArray[np.int32], NDArray[np.int32]]] = []  # (parent, choice) of each
    for number, layer in enumerate(layers):
        cost_FK = cost_F[:, None] + layer.cost_K
        loss_FK = loss_F[:, None] + layer.loss_K
        # slack for rounding; the final choice uses the true budget
        room = (budget - sum(cheapest[number + 1 :])) * (1 + 1e-12)
        kept = _undominated(cost_FK.ravel(), loss_FK.ravel(), room)
        parent, choice = np.divmod(kept, len(layer.choices))
        trail.append((parent.astype(np.int32), choice.astype(np.int32)))
        cost_F, loss_F = cost_FK.ravel()[kept], loss_FK.ravel()[kept]
    at = int(np.searchsorted(cost_F, budget, side="right")) - 1  # losses fall along F
    picks = []
    for parent, choice in reversed(trail):
        picks.append(int(choice[at]))
        at = int(parent[at])
    return picks[::-1]


def _undominated(cost_A: Floats, loss_A: Floats, room: float) -> NDArray[np.int64]:
    """Indices of the undominated pairs by rising cost, at most `RESOLUTION`.

    To thin them, the last and best pair of each cost interval stays, and the cheapest pair of all,
    so that rounding always leaves one within the budget.
    """
    order = np.lexsort((loss_A, cost_A))
    order = order[: max(1, int(np.searchsorted(cost_A[order], room, side="right")))]
    best_before = np.minimum.accumulate(np.concatenate([[inf], loss_A[order][:-1]]))
    order = order[loss_A[order] < best_before]
    if len(order) <= RESOLUTION:
        return order
    low, high = cost_A[order[0]], cost_A[order[-1]]
    interval = ((cost_A[order] - low) * ((RESOLUTION - 2) / (high - low))).astype(np.int64)
    last = np.append(interval[1:] != interval[:-1], True)
    last[0] = True
    thinned: NDArray[np.int64] = order[last]
    return thinned


def _fill(layers: Sequence[_Options], picks: list[int], budget: float) -> list[int]:
    """Spend the rest of the budget on costlier choices: those that lower the loss most, then fill most.

    This settles ties, and recovers with exact arithmetic what a thinned list has lost. A costlier
    choice never has more loss.
    """
    picks = list(picks)
    while True:
        left = budget - sum(float(layer.cost_K[k]) for layer, k in zip(layers, picks, strict=True))
        gains = [
            (layer.loss_K[k] - layer.loss_K[j], layer.cost_K[j] - layer.cost_K[k], i, j)
            for i, (layer, k) in enumerate(zip(layers, picks, strict=True))
            for j in range(k + 1, len(layer.choices))
            if 0 < layer.cost_K[j] - layer.cost_K[k] <= left
        ]
        if not gains:
            return picks
        _, _, i, j = max(gains, key=lambda gain: gain[:2])
        picks[i] = j


def _kept(name: str, layer: nn.Module, choice: Choice) -> int:
    reason = _why_not(layer, choice)
    if reason is not None:
        raise UserError(f"{name} cannot take {choice}: {reason}; leave this choice out")
    count = layer.get_parameter("weight").numel()
    if isinstance(choice, Pattern):
        return count // choice.m * choice.n
    kept_share(choice)  # checks the ratio
    return count - round((choice or 0) * count)  # as `removal.weights` rounds


def _why_not(layer: nn.Module, choice: Choice) -> str | None:
    return why_not_nm(layer, choice.m) if isinstance(choice, Pattern) else None
