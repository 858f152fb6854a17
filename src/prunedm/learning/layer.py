"""Masks inside layers, for scripts that train a model in their own loop.

`wrap_model_with_maskpro` puts a `MaskProLayer` around each layer; `unwrap_model` removes it.
The stages and the MaskPro trainer mask from outside (`learning.learner`) and change no module.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from prunedm.architecture import architecture_of
from prunedm.errors import UserError
from prunedm.learning.distribution import ConditionalBernoulli
from prunedm.learning.logits import MaskLogits
from prunedm.learning.relaxation import relaxed
from prunedm.masks import Masks, Pattern
from prunedm.networks.layer_kinds import NAMES, find_kind, from_matrix, oriented, weight_of
from prunedm.networks.layers import prunable_layers, why_not_nm
from prunedm.removal.nm import eligible_layers, nm_mask


class MaskProLayer(nn.Module):
    """One layer under an N:M mask with learned logits.

    In training mode every call draws a soft mask at `temperature`, whose gradient reaches the logits.
    In evaluation mode the mask is the most probable one. `set_mask` fixes a mask for both modes.

    Draws use PyTorch's global generator, as dropout does: gradient checkpointing restores it when it
    calls a layer again, and so gets the same mask.
    """

    fixed_mask: torch.Tensor | None

    def __init__(
        self,
        original_layer: nn.Module,
        n: int,
        m: int,
        *,
        temperature: float = 1.0,
        lead: float = 1.0,
    ) -> None:
        """The first mask keeps the N largest |weight| of a group; their logits lead by `lead`.

        Raises `UserError` unless 0 < N < M and M divides the layer's input channels.
        """
        super().__init__()
        pattern = Pattern(n, m)
        reason = why_not_wrapped(original_layer, m)
        if reason:
            raise UserError(f"{type(original_layer).__name__} cannot be {pattern}: {reason}")
        self.n, self.m, self.pattern = n, m, pattern
        self.temperature = temperature
        self.original_layer = original_layer
        size = weight_of(original_layer).detach().float().abs()
        first = Masks.uniform({"": nm_mask(size, pattern)}, pattern)
        self.mask_logits = nn.Parameter(MaskLogits(first, {"": size}, lead=lead).groups[0].detach())
        self.register_buffer("fixed_mask", None, persistent=False)
        self.train(original_layer.training)

    @property
    def weight(self) -> torch.Tensor:
        """The original layer's weight, unmasked."""
        return self.original_layer.get_parameter("weight")

    @property
    def bias(self) -> torch.Tensor | None:
        return dict(self.original_layer.named_parameters()).get("bias")

    def forward(self, *arguments: Any, **keywords: Any) -> torch.Tensor:
        mask = self._drawn_mask() if self.training and self.fixed_mask is None else self.get_mask()
        weight = self.weight_oriented * mask.to(self.weight.dtype)
        masked = {"weight": oriented(self.original_layer, weight)}
        output: torch.Tensor = functional_call(self.original_layer, masked, arguments, keywords)
        return output

    @torch.no_grad()
    def get_mask(self) -> torch.Tensor:
        """The hard mask, boolean, as [O, I, *taps]: the fixed or the most probable one."""
        if self.fixed_mask is not None:
            return self.fixed_mask
        return self._of_weight(ConditionalBernoulli(self.mask_logits, self.n).mode())

    def set_mask(self, mask: torch.Tensor | None) -> None:
        """Fix the mask, which need not be N:M; None returns to the logits.

        Raises `UserError` where its shape is not the weight's, as [O, I, *taps].
        """
        weight = self.weight_oriented
        if mask is not None and mask.shape != weight.shape:
            raise UserError(
                f"mask has shape {tuple(mask.shape)}, the layer's weight {tuple(weight.shape)}"
            )
        self.fixed_mask = None if mask is None else mask.bool().to(weight.device).contiguous()

    @property
    def weight_oriented(self) -> torch.Tensor:
        """The weight as [O, I, *taps], as masks are."""
        return oriented(self.original_layer, self.weight)

    def extra_repr(self) -> str:
        return str(self.pattern)

    def _drawn_mask(self) -> torch.Tensor:
        logits_GM = self.mask_logits
        seed = torch.randint(2**62, (), generator=torch.default_generator)
        generator = torch.Generator(logits_GM.device).manual_seed(int(seed))
        return self._of_weight(relaxed(logits_GM, self.pattern, self.temperature, generator))

    def _of_weight(self, values_GM: torch.Tensor) -> torch.Tensor:
        # contiguous: else the product has the mask's memory format, and a convolution other last bits
        return from_matrix(values_GM, self.weight_oriented.shape).contiguous()


def wrap_model_with_maskpro(
    model: nn.Module,
    n: int,
    m: int,
    target_layers: Iterable[str] | None = None,
    *,
    temperature: float = 1.0,
    lead: float = 1.0,
    protect: Iterable[str] | None = None,
) -> nn.Module:
    """Replace layers by `MaskProLayer`s, in place; returns the model.

    `target_layers`: prefixes of module names, or regular expressions found in them; None is all.
    Protected layers and those whose input channels are not a multiple of M stay as they are
    (`check_nm_compatibility` names the latter). `maskpro_layers` finds the wrapped ones. Raises
    `UserError` where a target matches nothing, or no layer is left to wrap.
    """
    pattern = Pattern(n, m)
    targets = (target_layers,) if isinstance(target_layers, str) else tuple(target_layers or ())
    protect = architecture_of(model).protect if protect is None else protect
    layers = prunable_layers(model, targets, protect=(*protect, *maskpro_layers(model)))
    if "" in layers:
        raise UserError(f"the model is itself a layer; use MaskProLayer(layer, {n}, {m})")
    if not layers:
        raise UserError(f"there is no layer to wrap: no {NAMES}, or all are wrapped already")
    eligible, _ = eligible_layers(layers, pattern)
    wrapped = {
        layer: MaskProLayer(layer, n, m, temperature=temperature, lead=lead)
        for layer in eligible.values()
    }
    _replace(model, wrapped)
    return model


@torch.no_grad()
def unwrap_model(model: nn.Module, *, apply_masks: bool = True) -> Masks:
    """Put the original layers back, the same objects; returns the hard masks by layer name.

    `apply_masks` zeroes the removed weights; without it every bit is as if the model had never been
    wrapped. Fixed masks that violate their N:M count as unstructured.
    """
    layers = maskpro_layers(model)
    masks = Masks(
        {name: layer.get_mask() for name, layer in layers.items()},
        {name: layer.pattern for name, layer in layers.items()},
    )
    exact = {name: p for name, p in masks.patterns.items() if masks.valid_groups(name) == 1}
    _replace(model, {layer: layer.original_layer for layer in layers.values()})
    if apply_masks:
        masks.apply_(model)
    return Masks(masks.by_layer, exact)


def maskpro_layers(model: nn.Module) -> dict[str, MaskProLayer]:
    """The wrapped layers of a model, by name."""
    return {name: x for name, x in model.named_modules() if isinstance(x, MaskProLayer)}


def separate_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The parameters of a model: its own, and the logits of its masks."""
    logits = [layer.mask_logits for layer in maskpro_layers(model).values()]
    known = {id(parameter) for parameter in logits}
    return [p for p in model.parameters() if id(p) not in known], logits


def why_not_wrapped(layer: nn.Module, m: int) -> str | None:
    """None where a layer can be wrapped, else the reason why not."""
    if find_kind(layer) is None:
        return f"it is not a {NAMES}"
    if "weight" not in dict(layer.named_parameters(recurse=False)):
        return "its weight is computed (parametrized); remove the parametrization first"
    return why_not_nm(layer, m)


def _replace(model: nn.Module, new: Mapping[Any, nn.Module]) -> None:
    """Replace every registration: a module may have two names, as in diffusers' downsamplers."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child in new:
                parent._modules[name] = new[child]
