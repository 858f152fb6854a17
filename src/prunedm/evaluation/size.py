"""Size and work: parameters, non-zeros, multiply-accumulates, packed bytes, N:M validity."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from prunedm.architecture import Inputs, answer, like_weights
from prunedm.layers import prunable_layers, why_not_nm
from prunedm.masks import Masks

HALF = 2  # bytes of a half-precision number


def count_parameters(denoiser: nn.Module) -> int:
    return sum(p.numel() for p in denoiser.parameters())


def count_nonzero(denoiser: nn.Module) -> int:
    return sum(int(torch.count_nonzero(p)) for p in denoiser.parameters())


@torch.no_grad()
def count_macs(network: nn.Module, inputs: Inputs) -> int:
    """Multiply-accumulates of a forward pass on `inputs`, attention products included.

    Counted by PyTorch's FLOP counter as the operations run; zeros in weights count as work, since
    no dense kernel skips them.
    """
    # the math form of attention is counted on every device and torch version; fused ones are not
    with (
        FlopCounterMode(display=False) as counter,
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    ):
        answer(network, like_weights(network, inputs))
    return int(counter.get_total_flops()) // 2


def packed_bytes(denoiser: nn.Module, masks: Masks | None) -> int:
    """Bytes in half precision, masked layers stored as their kept values and one bit a weight."""
    total = HALF * count_parameters(denoiser)
    for _, mask in masks or ():
        kept = int(mask.sum())
        total += HALF * (kept - mask.numel()) + -(-mask.numel() // 8)
    return total


@dataclass(frozen=True)
class NmValidity:
    """How far a model's masks are what hardware accepts."""

    pattern: str
    valid: float | None  # share of groups with at most N non-zeros, over the masked layers
    layers: int
    dense: dict[str, str]  # prunable layers without a mask, and why


def nm_validity(denoiser: nn.Module, masks: Masks | None) -> NmValidity:
    """Checked on the weights themselves, not on the masks."""
    if masks is None or not masks.patterns:
        return NmValidity("", None, 0, {})
    m = min(pattern.m for pattern in masks.patterns.values())
    dense = {
        name: why_not_nm(layer, m) or "left dense"
        for name, layer in prunable_layers(denoiser).items()
        if name not in masks.by_layer
    }
    return NmValidity(masks.pattern_text, masks.validity(denoiser), len(masks.patterns), dense)
