"""Unstructured masks without the lowest scores, per row, per layer or over all layers."""

import math
from collections.abc import Mapping

import numpy as np
import torch

from prunedm.errors import UserError
from prunedm.masks import Masks


def weight_masks(
    scores: Mapping[str, torch.Tensor],
    ratio: float,
    *,
    scope: str,
    positions: Mapping[str, int] | None = None,
) -> Masks:
    """Remove the share `ratio` of the weights of each output row, of each layer, or of all.

    `scope`: "row" (Wanda's for unstructured pruning), "layer" or "global".

    With `positions`, a weight costs as much as its layer has output positions: `ratio` is then a
    share of the layers' MACs.
    """
    if scope == "row":
        return Masks({name: _keep_highest_of_rows(score, ratio) for name, score in scores.items()})
    if scope == "layer":
        return Masks({name: keep_highest(score, ratio) for name, score in scores.items()})
    together = torch.cat([score.reshape(-1) for score in scores.values()])
    if positions is None:
        kept = keep_highest(together, ratio)
    else:
        sizes = torch.tensor([score.numel() for score in scores.values()])
        each = torch.tensor([positions[name] for name in scores])
        kept = _keep_highest_by_cost(together, each.repeat_interleave(sizes), ratio)
    parts = kept.split([score.numel() for score in scores.values()])
    return Masks(
        {n: part.reshape(s.shape) for (n, s), part in zip(scores.items(), parts, strict=True)}
    )


def keep_highest(score: torch.Tensor, ratio: float) -> torch.Tensor:
    """Boolean mask without the round(ratio * count) lowest absolute scores; earlier ties go first."""
    size = score.abs().reshape(-1).cpu().numpy()
    removed = round(ratio * size.size)
    mask = np.ones(size.shape, dtype=bool)
    if removed:
        limit = np.partition(size, removed - 1)[removed - 1]
        mask[size < limit] = False
        ties = np.flatnonzero(size == limit)
        mask[ties[: removed - (size.size - int(mask.sum()))]] = False
    return torch.from_numpy(mask).reshape(score.shape).to(score.device)


def _keep_highest_of_rows(score: torch.Tensor, ratio: float) -> torch.Tensor:
    size_OK = score.abs().flatten(1)
    removed_OR = size_OK.argsort(dim=1, stable=True)[:, : round(ratio * size_OK.shape[1])]
    mask_OK = torch.ones_like(size_OK, dtype=torch.bool).scatter_(1, removed_OR, False)
    return mask_OK.reshape(score.shape)


def share_of_weights(
    kind: str,
    ratio: float,
    *,
    weights: Mapping[str, int],
    total: int,
    positions: Mapping[str, int] | None = None,
) -> float:
    """The share of the layers' weights (with `positions`, of their MACs) to remove for a target.

    `weights`: the number in each layer. `total`: parameters or MACs of the whole model, some outside
    these layers. Raises `UserError` where the layers have too few.
    """
    if kind == "weights":
        return ratio
    each = positions or dict.fromkeys(weights, 1)
    here = sum(count * each[name] for name, count in weights.items())
    if ratio * total > here:
        most = math.floor(1000 * here / total) / 1000
        raise UserError(
            f"{kind}={ratio:g} cannot be reached: {most:g} of the {kind} are in the layers that "
            "can be pruned"
        )
    return ratio * total / here


def _keep_highest_by_cost(score: torch.Tensor, cost: torch.Tensor, ratio: float) -> torch.Tensor:
    """Remove the lowest absolute scores that together make up `ratio` of the cost."""
    order = score.abs().argsort(stable=True)
    gone = cost[order].cumsum(0)
    count = int(torch.searchsorted(gone, round(ratio * int(gone[-1])), right=True))
    return torch.ones_like(score, dtype=torch.bool).index_fill_(0, order[:count], False)
