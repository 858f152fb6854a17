"""N:M masks from scores: in every group of M input channels, the N highest stay."""

from collections.abc import Mapping

import torch
from torch import nn

from prunedm.errors import UserError
from prunedm.masks import Masks, Pattern
from prunedm.networks.layers import to_groups, why_not_nm

LARGEST_M = 16
_CHUNK = 1 << 18  # weights at a time: they stay in the processor's cache


def nm_mask(score: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """Boolean mask of the score's shape with exactly N kept in every group; ties keep the first.

    A weight's rank is the number of larger weights in its group, counted by M (M-1) / 2 comparisons
    of whole tensors, which is many times faster than sorting rows of M.
    """
    m = pattern.m
    outputs, inputs = score.shape[:2]
    assert inputs % m == 0, f"{tuple(score.shape)} has no groups of {m}"
    score_OGMK = score.reshape(outputs, inputs // m, m, -1)  # K kernel taps
    mask_OGMK = torch.empty(score_OGMK.shape, dtype=torch.bool, device=score.device)
    rows = max(1, _CHUNK // score_OGMK[0].numel())
    for start in range(0, outputs, rows):
        member_MOGK = score_OGMK[start : start + rows].movedim(2, 0).contiguous()
        rank_MOGK = torch.zeros(member_MOGK.shape, dtype=torch.uint8, device=score.device)
        for j in range(m):
            for i in range(j):
                first = member_MOGK[i] >= member_MOGK[j]
                rank_MOGK[j] += first
                rank_MOGK[i] += ~first
        mask_OGMK[start : start + rows] = (rank_MOGK < pattern.n).movedim(0, 2)
    return mask_OGMK.reshape(score.shape)


def eligible_layers(
    layers: Mapping[str, nn.Module], pattern: Pattern
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Layers that can have the pattern, and why the others cannot. `UserError` if none can."""
    reasons = {name: why_not_nm(layer, pattern.m) for name, layer in layers.items()}
    eligible = {name: layer for name, layer in layers.items() if reasons[name] is None}
    if not eligible:
        found = "; ".join(sorted({str(reason) for reason in reasons.values()}))
        raise UserError(f"pattern {pattern} fits no layer: {found}")
    return eligible, {name: reason for name, reason in reasons.items() if reason is not None}


def nm_masks(
    layers: Mapping[str, nn.Module], scores: Mapping[str, torch.Tensor], pattern: Pattern
) -> Masks:
    """Masks for every layer that can have the pattern. Raises `UserError` if none can."""
    eligible, _ = eligible_layers(layers, pattern)
    return Masks.uniform({name: nm_mask(scores[name].abs(), pattern) for name in eligible}, pattern)


def project(mask: torch.Tensor, score: torch.Tensor, pattern: Pattern) -> tuple[torch.Tensor, int]:
    """The nearest mask with exactly N kept in every group, and the number of changed groups.

    A group with more than N loses its lowest scores; one with fewer gains the highest of the others.
    Ties keep the first. Scores are finite, of any sign.
    """
    assert bool(score.isfinite().all())
    score = score.float()
    best = nm_mask(score.masked_fill(~mask, -torch.inf), pattern) & mask  # at most N per group
    projected = nm_mask(score.masked_fill(mask, -torch.inf).masked_fill(best, torch.inf), pattern)
    changed_G = to_groups(projected != mask, pattern.m).any(1)
    return projected, int(changed_G.sum())


def exact_pattern(layer: nn.Module, mask: torch.Tensor) -> Pattern | None:
    """The N:M that holds in every group of the layer's mask, or None.

    The one with the smallest M, which implies the others (1:2 is also 2:4, 2:4 is also 4:8).
    """
    for m in range(2, LARGEST_M + 1):
        if why_not_nm(layer, m) is None:
            n = int(to_groups(mask, m)[0].sum())
            if 0 < n < m and bool((Pattern(n, m).kept_in(mask) == n).all()):
                return Pattern(n, m)
    return None
