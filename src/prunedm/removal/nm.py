"""N:M masks from scores: in every group of M input channels, the N highest stay."""

from collections.abc import Mapping

import torch
from torch import nn

from prunedm.errors import UserError
from prunedm.layers import from_groups, to_groups, why_not_nm
from prunedm.masks import Masks, Pattern


def nm_mask(score: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """Boolean mask of the score's shape with exactly N kept in every group; ties keep the first."""
    score_GM = to_groups(score, pattern.m)
    best_GN = score_GM.sort(dim=1, descending=True, stable=True).indices[:, : pattern.n]
    mask_GM = torch.zeros_like(score_GM, dtype=torch.bool).scatter_(1, best_GN, True)
    return from_groups(mask_GM, score.shape).contiguous()


def nm_masks(
    layers: Mapping[str, nn.Module], scores: Mapping[str, torch.Tensor], pattern: Pattern
) -> Masks:
    """Masks for every layer that can take the pattern. Raises `UserError` if none can."""
    eligible = [name for name, layer in layers.items() if why_not_nm(layer, pattern.m) is None]
    if not eligible:
        reasons = {why_not_nm(layer, pattern.m) for layer in layers.values()}
        raise UserError(f"pattern {pattern} fits no layer: {'; '.join(sorted(map(str, reasons)))}")
    return Masks({name: nm_mask(scores[name], pattern) for name in eligible}, pattern)
