"""What is left of every prunable layer."""

import torch
from torch import nn

from prunedm.evaluation.results import LayerSparsity
from prunedm.masks import Masks
from prunedm.networks.layer_kinds import weight_of
from prunedm.networks.layers import prunable_layers, why_not_nm


@torch.no_grad()
def layer_sparsity(denoiser: nn.Module, masks: Masks | None) -> list[LayerSparsity]:
    """Every prunable layer in the model's order; zeros and validity are counted on the weights."""
    patterns = masks.patterns if masks else {}
    m = min((pattern.m for pattern in patterns.values()), default=0)
    found = []
    for name, layer in prunable_layers(denoiser).items():
        weight, pattern = weight_of(layer), patterns.get(name)
        found.append(
            LayerSparsity(
                name=name,
                shape=tuple(weight.shape),
                weights=weight.numel(),
                nonzero=int(torch.count_nonzero(weight)),
                pattern=str(pattern) if pattern else "",
                valid=float(pattern.valid_in(weight).double().mean()) if pattern else None,
                why_dense=_why_dense(name, layer, masks, m),
            )
        )
    return found


def _why_dense(name: str, layer: nn.Module, masks: Masks | None, m: int) -> str:
    if masks is None or name in masks.by_layer:
        return ""
    return (why_not_nm(layer, m) if m else None) or "left dense"
