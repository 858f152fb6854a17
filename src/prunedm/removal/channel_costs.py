"""What a UNet of given widths costs, computed from its layers without running or touching it."""

from collections.abc import Mapping

import torch
from diffusers.models.attention_processor import Attention
from torch import nn

from prunedm.architecture import Inputs, answer
from prunedm.networks.layer_kinds import Side, find_kind, groups_of, weight_of, width_of
from prunedm.networks.layers import hooked, prunable_layers

Removed = Mapping[tuple[str, Side], int]  # positions that go, by layer and side


def width(module: nn.Module, side: Side) -> int:
    """Channels of a layer or GroupNorm on one side."""
    return module.num_channels if isinstance(module, nn.GroupNorm) else width_of(module, side)


def count_params(denoiser: nn.Module, removed: Removed | None = None) -> int:
    """Parameters of the denoiser, or of what is left of it once `removed` is gone."""
    total = sum(parameter.numel() for parameter in denoiser.parameters())
    gone = removed or {}
    for name in dict.fromkeys(layer for layer, _ in gone):
        module = denoiser.get_submodule(name)
        total -= sum(parameter.numel() for parameter in module.parameters())
        total += _weights(module, name, gone) + _outputs(module, name, gone) * (
            module.bias is not None
        )
    return total


def planned_macs(
    denoiser: nn.Module, positions: Mapping[str, int], removed: Removed | None = None
) -> int:
    """Multiply-accumulates of layers and attention once `removed` is gone, for one image.

    It runs nothing, as a search over widths must; `evaluation.size.count_macs` counts what runs.
    """
    gone, total = removed or {}, 0
    for name, module in denoiser.named_modules():
        if find_kind(module) is not None:
            total += _weights(module, name, gone) * positions[name]
        elif isinstance(module, Attention):
            inner = _outputs(module.to_q, f"{name}.to_q", gone)
            total += 2 * inner * positions[f"{name}.to_q"] * positions[f"{name}.to_k"]
    return total


@torch.no_grad()
def layer_positions(denoiser: nn.Module, inputs: Inputs) -> dict[str, int]:
    """Output positions (pixels, tokens) of each layer, for each row of `inputs`."""
    positions: dict[str, int] = {}
    rows = len(next(iter(inputs.values())))  # a layer may see more: tokens folded into its batch

    def record(name: str, layer: nn.Module, _: object, output: torch.Tensor) -> None:
        positions[name] = output.numel() // (rows * width_of(layer, "out"))

    with hooked(prunable_layers(denoiser, protect=()), record):
        answer(denoiser, inputs)
    return positions


def _outputs(module: nn.Module, name: str, removed: Removed) -> int:
    return width(module, "out") - removed.get((name, "out"), 0)


def _weights(module: nn.Module, name: str, removed: Removed) -> int:
    if isinstance(module, nn.GroupNorm):
        return _outputs(module, name, removed) * module.affine
    inputs = width(module, "in") - removed.get((name, "in"), 0)
    taps = weight_of(module)[0, 0].numel()
    return _outputs(module, name, removed) * inputs * taps // groups_of(module)
