"""The sparsity of a model, wrapped or not, under the names that old MaskPro scripts read."""

from collections.abc import Mapping
from typing import TypedDict

import torch
from torch import nn

from prunedm.learning.layer import (
    MaskProLayer,
    maskpro_layers,
    separate_parameters,
    why_not_wrapped,
)
from prunedm.masks import Masks, Pattern
from prunedm.networks.layer_kinds import weight_of
from prunedm.networks.layers import prunable_layers
from prunedm.removal.nm import exact_pattern


class LayerSparsity(TypedDict):
    """One layer; n, m and nm_compliance are None where it is neither wrapped nor N:M."""

    shape: tuple[int, ...]
    sparsity: float
    n: int | None
    m: int | None
    nm_compliance: float | None


class OverallSparsity(TypedDict):
    """overall_sparsity = masked_parameters / total_parameters, of the whole model without logits.

    masked_parameters: weights of layers that are masked or zero.
    nm_compliance: share of groups with exactly N kept over all N:M layers; 0 without any.
    """

    overall_sparsity: float
    total_parameters: int
    masked_parameters: int
    nm_compliance: float


class SparsitySummary(TypedDict):
    """What `get_model_sparsity_summary` returns."""

    overall_stats: OverallSparsity
    layer_stats: dict[str, LayerSparsity]


@torch.no_grad()
def get_model_sparsity_summary(model: nn.Module, masks: Masks | None = None) -> SparsitySummary:
    """Weights of every layer that its mask removes or that are zero.

    The mask comes from `masks` or from the wrapped layer. A layer without one counts as N:M where
    its zeros form an N:M pattern with M up to 16.
    """
    wrapped = maskpro_layers(model)
    found = prunable_layers(model, protect=wrapped) | wrapped
    layers = {name: found[name] for name, _ in model.named_modules() if name in found}
    masks = _layer_masks(layers, masks or Masks({}))
    stats: dict[str, LayerSparsity] = {}
    for name, mask in masks:
        nonzero = _weight(layers[name]) != 0
        pattern = masks.patterns.get(name)
        stats[name] = {
            "shape": tuple(mask.shape),
            "sparsity": int((~(mask.to(nonzero.device) & nonzero)).sum()) / mask.numel(),
            "n": pattern.n if pattern else None,
            "m": pattern.m if pattern else None,
            "nm_compliance": masks.valid_groups(name),
        }
    total = sum(parameter.numel() for parameter in separate_parameters(model)[0])
    gone = sum(round(s["sparsity"] * masks.by_layer[name].numel()) for name, s in stats.items())
    overall: OverallSparsity = {
        "overall_sparsity": gone / total if total else 0.0,
        "total_parameters": total,
        "masked_parameters": gone,
        "nm_compliance": masks.compliance,
    }
    return {"overall_stats": overall, "layer_stats": stats}


def _layer_masks(layers: Mapping[str, nn.Module], known: Masks) -> Masks:
    """Masks with patterns: the known ones, those of wrapped layers, or where weights are not zero."""
    by_layer: dict[str, torch.Tensor] = {}
    patterns: dict[str, Pattern | None] = {}
    for name, layer in layers.items():
        if name in known.by_layer:
            by_layer[name], patterns[name] = known.by_layer[name], known.patterns.get(name)
        elif isinstance(layer, MaskProLayer):
            by_layer[name], patterns[name] = layer.get_mask(), layer.pattern
        else:
            by_layer[name] = _weight(layer) != 0
            patterns[name] = exact_pattern(layer, by_layer[name])
    return Masks(by_layer, {name: pattern for name, pattern in patterns.items() if pattern})


def _weight(layer: nn.Module) -> torch.Tensor:
    return layer.weight_oriented if isinstance(layer, MaskProLayer) else weight_of(layer)


def check_nm_compatibility(model: nn.Module, n: int, m: int) -> dict[str, str]:
    """The layers of a model (or the layer itself, "") that cannot be N:M, and why; {} if all can.

    Raises `UserError` unless 0 < N < M.
    """
    Pattern(n, m)
    layers: Mapping[str, nn.Module] = prunable_layers(model, protect=()) or {"": model}
    reasons = {name: why_not_wrapped(layer, m) for name, layer in layers.items()}
    return {name: reason for name, reason in reasons.items() if reason}
