"""Size and work: parameters, non-zeros, multiply-accumulates, packed bytes, N:M validity."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from prunedm.architecture import Inputs, answer, like_weights
from prunedm.evaluation.metric import Measurement, Metric, Subject, amount
from prunedm.evaluation.results import Figures
from prunedm.masks import Masks
from prunedm.networks.layers import prunable_layers, why_not_nm

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


def _figures(of: Subject) -> dict[str, Any]:
    validity = nm_validity(of.denoiser, of.masks)
    params, nonzero = count_parameters(of.denoiser), count_nonzero(of.denoiser)
    return {
        "params": params,
        "nonzero": nonzero,
        "sparsity": 1 - nonzero / params,
        "bytes_disk": of.bytes_disk(),
        "bytes_packed": packed_bytes(of.denoiser, of.masks),
        "pattern": validity.pattern,
        "nm_valid": validity.valid,
        "nm_layers": validity.layers,
        "nm_dense": validity.dense,
    }


def _where_valid(figures: Figures) -> str:
    plural = "" if figures.nm_layers == 1 else "s"
    return f" of {figures.pattern} in {figures.nm_layers} layer{plural}"


_SIZE = Measurement("size", "weights", _figures)
_BYTES = partial(amount, unit="B")
PARAMS = Metric("params", "parameters", "weights and biases of the denoiser", amount, _SIZE)
NONZERO = Metric("nonzero", "non-zero", "parameters that are not zero", amount, _SIZE)
SPARSITY = Metric(
    "sparsity",
    "sparsity",
    "share of the model's own parameters that are zero; removed channels do not count",
    lambda value, base: f"{100 * value:.1f} %",
    _SIZE,
    better="",
)
MACS = Metric(
    "macs",
    "MACs",
    "multiply-accumulates of one image through the denoiser once, attention included",
    amount,
    Measurement("macs", "weights", lambda of: {"macs": count_macs(of.denoiser, of.example(1))}),
)
DISK = Metric("bytes_disk", "disk", "bytes of the denoiser's weight files", _BYTES, _SIZE)
PACKED = Metric(
    "bytes_packed",
    "packed (fp16)",
    "bytes in half precision; layers with N:M masks as their kept values and one bit a weight",
    _BYTES,
    _SIZE,
)
COMPRESSION = Metric(  # figured where the dense model is beside it
    "compression",
    "compression",
    "the dense model's packed bytes over this model's",
    lambda value, base: f"×{value:.2f}",
    _SIZE,
    better="",
)
NM_VALID = Metric(
    "nm_valid",
    "N:M",
    "share of groups of M weights with at most N that are not zero, over the masked layers",
    # rounded down: what is not whole never reads 100 %
    lambda value, base: f"{math.floor(1000 * value) / 10:g} %",
    _SIZE,
    better="",
    detail=_where_valid,
)
