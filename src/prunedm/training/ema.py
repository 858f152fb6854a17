"""Exponential moving average of weights (Polyak & Juditsky 1992; decay warm-up as in Song et al.)."""

from collections.abc import Mapping

import torch
from torch import nn


class Ema:
    """Shadow copies of a module's parameters.

    The decay starts low, min(decay, (1 + k) / (10 + k)), so that the average of a short run is not
    dominated by its starting point.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.shadow = {name: p.detach().clone() for name, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        weights = [p.detach() for _, p in module.named_parameters()]
        torch._foreach_lerp_(list(self.shadow.values()), weights, 1 - decay)

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        for name, parameter in module.named_parameters():
            parameter.copy_(self.shadow[name])

    def load(self, shadow: Mapping[str, torch.Tensor], updates: int) -> None:
        self.updates = updates
        for name, tensor in shadow.items():
            self.shadow[name].copy_(tensor)
