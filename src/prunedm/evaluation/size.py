"""Size and work: parameters, non-zeros, multiply-accumulates, packed bytes, N:M validity."""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from prunedm.architecture import Inputs, answer, like_weights
from prunedm.evaluation.metric import Measurement, Metric, Subject, amount
from prunedm.evaluation.results import Figures, LayerFigures
from prunedm.masks import Masks
from prunedm.networks.layer_kinds import weight_of
from prunedm.networks.layers import hooked, hooked_before, prunable_layers, why_not_nm

HALF = 2  # bytes of a half-precision number


def count_parameters(denoiser: nn.Module) -> int:
    return sum(p.numel() for p in denoiser.parameters())


def count_nonzero(denoiser: nn.Module) -> int:
    return sum(int(torch.count_nonzero(p)) for p in denoiser.parameters())


def count_macs(network: nn.Module, inputs: Inputs) -> int:
    """Multiply-accumulates of a forward pass on `inputs`, attention products included.

    Counted by PyTorch's FLOP counter as operations run. Zero weights count, since no dense kernel
    skips them.
    """
    return macs_inside(network, inputs, {"": network})[""]


@torch.no_grad()
def macs_inside(
    network: nn.Module, inputs: Inputs, modules: Mapping[str, nn.Module]
) -> dict[str, int]:
    """As `count_macs`, those that are done within each of these modules."""
    spent = dict.fromkeys(modules, 0)

    def note(sign: int, name: str, *_: Any) -> None:
        spent[name] += sign * int(counter.get_total_flops())

    # only attention's math backend is counted on every device and torch version
    with (
        FlopCounterMode(display=False) as counter,
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        hooked_before(modules, partial(note, -1)),
        hooked(modules, partial(note, 1)),
    ):
        answer(network, like_weights(network, inputs))
    return {name: flops // 2 for name, flops in spent.items()}


def packed_bytes(denoiser: nn.Module, masks: Masks | None) -> int:
    """Bytes in half precision, with masked layers as their kept values plus one bit per weight."""
    total = HALF * count_parameters(denoiser)
    for _, mask in masks or ():
        kept = int(mask.sum())
        total += HALF * (kept - mask.numel()) + -(-mask.numel() // 8)
    return total


def nm_validity(denoiser: nn.Module, masks: Masks | None) -> dict[str, Any]:
    """The figures of N:M masks, checked on the weights themselves; empty without any."""
    if masks is None or not masks.patterns:
        return {"pattern": "", "nm_valid": None, "nm_layers": 0, "nm_dense": {}}
    return {
        "pattern": masks.pattern_text,
        "nm_valid": masks.validity(denoiser),
        "nm_layers": len(masks.patterns),
        "nm_dense": _why_dense(denoiser, masks),
    }


@torch.no_grad()
def layer_sparsity(denoiser: nn.Module, masks: Masks | None) -> list[LayerFigures]:
    """Every prunable layer in the model's order; zeros and validity are counted on the weights."""
    patterns = masks.patterns if masks else {}
    dense = _why_dense(denoiser, masks) if masks else {}
    found = []
    for name, layer in prunable_layers(denoiser).items():
        weight, pattern = weight_of(layer), patterns.get(name)
        found.append(
            LayerFigures(
                name=name,
                shape=tuple(weight.shape),
                weights=weight.numel(),
                nonzero=int(torch.count_nonzero(weight)),
                pattern=str(pattern) if pattern else "",
                valid=float(pattern.valid_in(weight).double().mean()) if pattern else None,
                why_dense=dense.get(name, ""),
            )
        )
    return found


def _why_dense(denoiser: nn.Module, masks: Masks) -> dict[str, str]:
    """The prunable layers without a mask, and why each has none."""
    m = min((pattern.m for pattern in masks.patterns.values()), default=0)
    return {
        name: (why_not_nm(layer, m) if m else None) or "left dense"
        for name, layer in prunable_layers(denoiser).items()
        if name not in masks.by_layer
    }


def _figures(of: Subject) -> dict[str, Any]:
    params, nonzero = count_parameters(of.denoiser), count_nonzero(of.denoiser)
    return nm_validity(of.denoiser, of.masks) | {
        "params": params,
        "nonzero": nonzero,
        "sparsity": 1 - nonzero / params,
        "bytes_disk": of.bytes_disk(),
        "bytes_packed": packed_bytes(of.denoiser, of.masks),
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
    "bytes in half precision; layers with N:M masks as their kept values plus one bit per weight",
    _BYTES,
    _SIZE,
)
COMPRESSION = Metric(  # computed in comparisons with the dense model
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
    "share of the masked layers' groups of M weights with at most N non-zeros",
    # rounded down: less than all never reads 100 %
    lambda value, base: f"{math.floor(1000 * value) / 10:g} %",
    _SIZE,
    better="",
    detail=_where_valid,
)
