"""Masks inside layers: for scripts that hold a model and train it by their own loop.

`wrap_model_with_maskpro` puts a `MaskProLayer` around each layer, `unwrap_model` takes it off again.
The stages do not use this: they mask from outside (`learning.learner`) and never change a module.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import nn
from torch.func import functional_call

from prunedm.errors import UserError
from prunedm.layer_kinds import NAMES, find_kind, oriented, weight_of
from prunedm.layers import PROTECTED, from_groups, prunable_layers, to_groups, why_not_nm
from prunedm.learning.distribution import ConditionalBernoulli
from prunedm.learning.logits import MaskLogits
from prunedm.learning.relaxation import relaxed
from prunedm.masks import Masks, Pattern
from prunedm.randomness import seed_for
from prunedm.removal.nm import eligible_layers, nm_mask

Draw = Literal["relaxed", "sample"]
LOGITS = "mask_logits"


class MaskProLayer(nn.Module):
    """One layer under an N:M mask with learned logits.

    In training mode every call draws a mask: a soft one, whose gradient reaches the logits
    (`draw="relaxed"`, at `temperature`), or a hard one from the conditional Bernoulli distribution,
    whose `log_prob()` a policy gradient takes (`draw="sample"`; `temperature` has no part in it). In
    evaluation mode the mask is the most probable one. `set_mask` fixes a mask for both modes.

    The weight and bias are those of `original_layer`, the same objects under the same names, so a
    wrapped model's state dict is the dense one's and a `mask_logits` (G, M) for each wrapped layer.
    Draw k is a function of (`seed`, k); `drawn` counts them. Other attributes are the original's.
    """

    original_layer: nn.Module
    mask_logits: nn.Parameter
    fixed_mask: torch.Tensor | None

    def __init__(
        self,
        original_layer: nn.Module,
        n: int,
        m: int,
        *,
        draw: Draw = "relaxed",
        temperature: float = 1.0,
        lead: float = 1.0,
        seed: int = 0,
    ) -> None:
        """The first mask keeps the N largest |weight| of a group; their logits lead by `lead`.

        Raises `UserError` unless 0 < N < M and the layer's input channels fall into groups of M.
        """
        super().__init__()
        pattern = Pattern(n, m)
        reason = why_not_wrapped(original_layer, m)
        if reason:
            raise UserError(f"{type(original_layer).__name__} cannot be {pattern}: {reason}")
        if draw not in ("relaxed", "sample"):
            raise UserError(f"draw = {draw!r} is neither 'relaxed' nor 'sample'")
        self.n, self.m, self.pattern = n, m, pattern
        self.draw, self.temperature, self.seed, self.drawn = draw, temperature, seed, 0
        for name, parameter in original_layer.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        size = weight_of(original_layer).detach().float().abs()
        first = Masks.uniform({"": nm_mask(size, pattern)}, pattern)
        self.mask_logits = nn.Parameter(MaskLogits(first, {"": size}, lead=lead).groups[0].detach())
        self.register_buffer("fixed_mask", None, persistent=False)
        self._hard_GM: torch.Tensor | None = None
        # not registered, its parameters are ours; last, since from here on it answers for us
        self.__dict__["original_layer"] = original_layer
        self.train(original_layer.training)

    def forward(self, *arguments: Any, **keywords: Any) -> torch.Tensor:
        mask = self._drawn_mask() if self.training and self.fixed_mask is None else self.get_mask()
        own: dict[str, torch.Tensor] = {
            name: p for name, p in self.named_parameters(recurse=False) if name != LOGITS
        }
        weight = self.weight_oriented * mask.to(own["weight"].dtype)
        own["weight"] = oriented(self.original_layer, weight)
        output: torch.Tensor = functional_call(self.original_layer, own, arguments, keywords)
        return output

    @torch.no_grad()
    def get_mask(self) -> torch.Tensor:
        """The hard mask, boolean, as [O, I, *taps]: the fixed one, or the most probable."""
        if self.fixed_mask is not None:
            return self.fixed_mask
        return self._of_weight(self._distribution().mode())

    def set_mask(self, mask: torch.Tensor | None) -> None:
        """Fix the mask; None goes back to the logits. It need not be N:M, nor leave anything out.

        Raises `UserError` where its shape is not the weight's, as [O, I, *taps].
        """
        weight = self.weight_oriented
        if mask is not None and mask.shape != weight.shape:
            raise UserError(
                f"mask has shape {tuple(mask.shape)}, the layer's weight {tuple(weight.shape)}"
            )
        self.fixed_mask = None if mask is None else mask.bool().to(weight.device).contiguous()

    def log_prob(self, mask: torch.Tensor | None = None) -> torch.Tensor:
        """log P of a hard mask under the logits, a scalar; of the last draw where none is given.

        Raises `UserError` where there has been no hard draw.
        """
        mask_GM = self._hard_GM if mask is None else to_groups(mask, self.m)
        if mask_GM is None:
            raise UserError(
                "no hard mask was drawn: call the layer in training mode, draw='sample'"
            )
        return self._distribution().log_prob(mask_GM.to(self.mask_logits.device)).sum()

    @property
    def weight_oriented(self) -> torch.Tensor:
        """The weight as [O, I, *taps], as masks are."""
        return oriented(self.original_layer, self.get_parameter("weight"))

    def extra_repr(self) -> str:
        return f"{self.pattern}, {self.draw}, {self.original_layer}"

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "original_layer" not in self.__dict__:
                raise
            return getattr(self.original_layer, name)

    def _distribution(self) -> ConditionalBernoulli:
        return ConditionalBernoulli(self.mask_logits, self.n)

    def _drawn_mask(self) -> torch.Tensor:
        # gradient checkpointing calls a layer again within the backward pass: the same mask then
        again = torch._C._current_graph_task_id() != -1 and self.drawn > 0
        index = self.drawn - 1 if again else self.drawn
        self.drawn = index + 1
        device = self.mask_logits.device
        generator = torch.Generator(device).manual_seed(seed_for(self.seed, "maskpro", index))
        if self.draw == "relaxed":
            return self._of_weight(
                relaxed(self.mask_logits, self.pattern, self.temperature, generator)
            )
        u_GM = torch.rand(
            self.mask_logits.shape,
            generator=generator,
            device=device,
            dtype=self.mask_logits.dtype,
        )
        self._hard_GM = self._distribution().sample(u_GM)
        return self._of_weight(self._hard_GM)

    def _of_weight(self, values_GM: torch.Tensor) -> torch.Tensor:
        # contiguous, or the product takes the mask's memory format, and a convolution other bits
        return from_groups(values_GM, self.weight_oriented.shape).contiguous()


def wrap_model_with_maskpro(
    model: nn.Module,
    n: int,
    m: int,
    target_layers: Iterable[str] | None = None,
    *,
    draw: Draw = "relaxed",
    temperature: float = 1.0,
    lead: float = 1.0,
    seed: int = 0,
    protect: Iterable[str] = PROTECTED,
) -> nn.Module:
    """Replace layers by `MaskProLayer`s, in place; returns the model.

    `target_layers`: prefixes of module names, or regular expressions found in them; None is all.
    Protected layers and those whose channels do not fall into groups of M stay as they are
    (`check_nm_compatibility` names the latter). `maskpro_layers` finds what was wrapped. Raises
    `UserError` where a target matches nothing, or no layer is left to wrap.
    """
    pattern = Pattern(n, m)
    layers = prunable_layers(model, _as_tuple(target_layers), protect=protect)
    if "" in layers:
        raise UserError(f"the model is itself a layer; use MaskProLayer(layer, {n}, {m})")
    if not layers:
        raise UserError(f"there is no layer to wrap: no {NAMES}, or all are wrapped already")
    eligible, _ = eligible_layers(layers, pattern)
    wrapped = {
        layer: MaskProLayer(
            layer, n, m, draw=draw, temperature=temperature, lead=lead, seed=seed_for(seed, name)
        )
        for name, layer in eligible.items()
    }
    _replace(model, wrapped)
    return model


@torch.no_grad()
def unwrap_model(model: nn.Module, *, apply_masks: bool = True) -> Masks:
    """Put the original layers back, the same objects; returns the hard masks by layer name.

    `apply_masks` zeroes the weights they leave out; without it every bit is as if the model had
    never been wrapped. Masks that do not hold their N:M (fixed ones may not) count as unstructured.
    """
    layers = maskpro_layers(model)
    masks = Masks(
        {name: layer.get_mask() for name, layer in layers.items()},
        {name: layer.pattern for name, layer in layers.items()},
    )
    exact = {name: p for name, p in masks.patterns.items() if masks.valid_groups(name) == 1}
    for layer in layers.values():
        original = layer.original_layer.train(layer.training)
        for key, _ in list(original.named_parameters(recurse=False)):
            # the same objects, unless something (load_state_dict(assign=True)) replaced ours
            setattr(original, key, layer.get_parameter(key))
    _replace(model, {layer: layer.original_layer for layer in layers.values()})
    if apply_masks:
        masks.apply_(model)
    return Masks(masks.by_layer, exact)


def maskpro_layers(model: nn.Module) -> dict[str, MaskProLayer]:
    """The wrapped layers of a model by name."""
    return {name: x for name, x in model.named_modules() if isinstance(x, MaskProLayer)}


def separate_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """All parameters of a model: those it had, and the logits of its masks."""
    logits = [layer.mask_logits for layer in maskpro_layers(model).values()]
    known = {id(parameter) for parameter in logits}
    return [p for p in model.parameters() if id(p) not in known], logits


def why_not_wrapped(layer: nn.Module, m: int) -> str | None:
    """None where a layer can be wrapped, else the reason."""
    if find_kind(layer) is None:
        return f"it is not a {NAMES}"
    if "weight" not in dict(layer.named_parameters(recurse=False)):
        return "its weight is computed (parametrized); remove the parametrization first"
    return why_not_nm(layer, m)


def _replace(model: nn.Module, new: Mapping[Any, nn.Module]) -> None:
    """Everywhere: a module may be registered under two names, as in diffusers' downsamplers."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child in new:
                parent._modules[name] = new[child]


def _as_tuple(targets: Iterable[str] | None) -> tuple[str, ...]:
    return (targets,) if isinstance(targets, str) else tuple(targets or ())
