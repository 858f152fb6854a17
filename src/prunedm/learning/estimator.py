"""How the logits learn: an estimator turns the trial of one step into a loss and its gradient.

To add one, write a file with a `Method` and add a line to `tables.ESTIMATORS`.
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
    """What an estimator can evaluate in one step. All masks of a step are compared on the same images,
    noise and timesteps (common random numbers).

    run: the loss of the network with these weights by layer, a scalar.
    first_loss: the loss of the masks at the start of learning.
    weights: the masked layers' weights, without masks.
    progress: 0 at the first step, 1 at the last.
    generator: on the logits' device; the source of all draws of the step.
    keep_magnitude: factor of the reward for the share of squared magnitude that masks keep.
    """

    run: Callable[[ByLayer], torch.Tensor]
    first_loss: Callable[[], torch.Tensor]
    weights: ByLayer
    progress: float
    generator: torch.Generator
    keep_magnitude: float = 0.0

    def loss(self, masks: ByLayer) -> torch.Tensor:
        """The loss under these masks, hard or soft; differentiable in masks and trained weights."""
        return self.loss_of(self.masked(masks))

    def masked(self, masks: ByLayer) -> ByLayer:
        """The layers' weights times their masks."""
        return {name: self.weights[name] * mask for name, mask in masks.items()}

    def loss_of(self, masked: ByLayer) -> torch.Tensor:
        """As `loss`, for weights that are already masked."""
        loss = self.run(masked)
        if self.keep_magnitude:
            kept = sum(weight.square().sum() for weight in masked.values())
            total = sum(self.weights[name].detach().square().sum() for name in masked)
            loss = loss - self.keep_magnitude * kept / total
        return loss


class Estimator(nn.Module, ABC):
    """Turns a trial into a loss; its buffers (moving averages) are part of a checkpoint."""

    optimizer: ClassVar[Literal["adam", "sgd"]] = "adam"

    @abstractmethod
    def forward(self, logits: MaskLogits, trial: Trial) -> torch.Tensor:
        """A scalar with the value of the loss and the gradient that the logits should follow."""

    def after_step(self, logits: MaskLogits, weights: ByLayer) -> None:
        """Set logits that are not learned but follow from the trained weights."""


@dataclass(frozen=True)
class Method:
    """A factory of estimators, and their default learning rate and lead of the first masks."""

    make: Callable[[LearnOptions], Estimator]
    lr: float
    logits: float


def uniforms(logits: Sequence[torch.Tensor], generator: torch.Generator) -> list[torch.Tensor]:
    """One number in [0, 1) per logit."""
    return [torch.rand(x.shape, generator=generator, device=x.device) for x in logits]
