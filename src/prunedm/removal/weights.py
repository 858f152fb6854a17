"""Unstructured masks: the lowest-scored weights go, per layer or over all layers together."""

from collections.abc import Mapping

import torch

from prunedm.masks import Masks


def weight_masks(scores: Mapping[str, torch.Tensor], ratio: float, *, scope: str) -> Masks:
    """Remove round(ratio * count) weights of each layer (`scope="layer"`) or of all ("global")."""
    if scope == "layer":
        return Masks({name: _keep_highest(score, ratio) for name, score in scores.items()})
    together = torch.cat([score.reshape(-1) for score in scores.values()])
    parts = _keep_highest(together, ratio).split([score.numel() for score in scores.values()])
    return Masks(
        {n: part.reshape(s.shape) for (n, s), part in zip(scores.items(), parts, strict=True)}
    )


def _keep_highest(score: torch.Tensor, ratio: float) -> torch.Tensor:
    flat = score.reshape(-1)
    removed = flat.topk(round(ratio * flat.numel()), largest=False, sorted=False).indices
    return (
        torch.ones_like(flat, dtype=torch.bool).index_fill_(0, removed, False).reshape(score.shape)
    )
