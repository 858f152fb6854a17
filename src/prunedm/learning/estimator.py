"""How the logits learn: an estimator turns one step's trial into a loss whose gradient it wants.

To add one: a file with a `Method`, and a line in `tables.ESTIMATORS`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import nn

from prunedm.learning.logits import MaskLogits
from prunedm.options import LearnOptions

ByLayer = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Trial:
    """What can be asked in one step. All masks that a step compares meet the same problems: the same
    images, noise and timesteps (common random numbers).

    run: the loss of the network with these weights by layer, a scalar.
    first_loss: the loss of the masks that learning began with.
    weights: those that the masks fall on.
    progress: 0 at the first step, 1 at the last.
    generator: on the logits' device; all draws of the step come from it.
    keep_magnitude: what the loss is lowered by for the share of squared magnitude that masks keep.
    """

    run: Callable[[ByLayer], torch.Tensor]
    first_loss: Callable[[], torch.Tensor]
    weights: ByLayer
    progress: float
    generator: torch.Generator
    keep_magnitude: float = 0.0

    def loss(self, masks: ByLayer) -> torch.Tensor:
        """Of masks by layer, hard or soft; differentiable in the masks and in trained weights."""
        return self.loss_of(self.masked(masks))

    def masked(self, masks: ByLayer) -> ByLayer:
        """The weights of these layers under their masks."""
        return {name: self.weights[name] * mask for name, mask in masks.items()}

    def loss_of(self, masked: ByLayer) -> torch.Tensor:
        """As `loss`, of weights that are masked already."""
        loss = self.run(masked)
        if self.keep_magnitude:
            kept = sum(weight.square().sum() for weight in masked.values())
            total = sum(self.weights[name].detach().square().sum() for name in masked)
            loss = loss - self.keep_magnitude * kept / total
        return loss


class Estimator(nn.Module, ABC):
    """Its buffers (moving averages) are part of a checkpoint."""

    optimizer: ClassVar[Literal["adam", "sgd"]] = "adam"

    @abstractmethod
    def forward(self, logits: MaskLogits, trial: Trial) -> torch.Tensor:
        """A scalar with the value of a loss and the gradient that the logits shall follow."""

    def after_step(self, logits: MaskLogits, weights: ByLayer) -> None:
        """Set logits that are not learned, but follow from the weights that were trained."""


@dataclass(frozen=True)
class Method:
    """An estimator by its options, and its usual learning rate and lead of the first masks."""

    make: Callable[[LearnOptions], Estimator]
    lr: float
    logits: float


def uniforms(logits: Sequence[torch.Tensor], generator: torch.Generator) -> list[torch.Tensor]:
    """Numbers in [0, 1), one a logit."""
    return [torch.rand(x.shape, generator=generator, device=x.device) for x in logits]
