"""Straight-through by marginals (SIMPLE, Ahmed et al. 2023): hard masks, gradients of their means."""

import torch

from prunedm.learning.estimator import Estimator, Method, Trial, uniforms
from prunedm.learning.logits import MaskLogits


class StraightThrough(Estimator):
    """Forward, the network uses a sample; backward, its inclusion probabilities."""

    def __init__(self, family: str = "conditional-bernoulli") -> None:
        super().__init__()
        self.family = family

    def forward(self, logits: MaskLogits, trial: Trial) -> torch.Tensor:
        masks = []
        noise = uniforms(list(logits.groups), trial.generator)
        for distribution, u_GM in zip(logits.distributions(self.family), noise, strict=True):
            inclusion_GM = distribution.inclusion()
            masks.append(distribution.sample(u_GM) + (inclusion_GM - inclusion_GM.detach()))
        return trial.loss(logits.by_layer(masks))


STRAIGHT_THROUGH = Method(lambda options: StraightThrough(options.distribution), lr=0.2, logits=3.0)
