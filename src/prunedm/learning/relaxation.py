"""Relaxed N:M patterns (after MaskLLM, Fang et al. 2024), with one additive logit per weight.

MaskLLM has one logit per pattern, K = C(M, N) per group. Here the logit of pattern k is the sum of its
members' logits, so a group has M: for 2:4, 4 numbers instead of 6; for 4:8, 8 instead of 70.
"""

import torch

from prunedm.learning.distribution import ConditionalBernoulli, all_patterns
from prunedm.learning.estimator import Estimator, Method, Trial
from prunedm.learning.logits import MaskLogits
from prunedm.masks import Pattern

MOST_PATTERNS = 128  # memory is K numbers per group; above this, noise is added per weight
NEGLIGIBLE = 1e-6  # a pattern's share below which it counts as absent


class RelaxedPatterns(Estimator):
    """Gradients through soft masks; the temperature falls geometrically from first to last."""

    def __init__(self, tau: tuple[float, float] = (2.0, 0.1)) -> None:
        super().__init__()
        self.tau = tau

    def forward(self, logits: MaskLogits, trial: Trial) -> torch.Tensor:
        tau = temperature(self.tau, trial.progress)
        pairs = zip(logits.groups, logits.patterns, strict=True)
        soft = [relaxed(l_GM, pattern, tau, trial.generator) for l_GM, pattern in pairs]
        return trial.loss(logits.by_layer(soft))


def relaxed(
    logits_GM: torch.Tensor, pattern: Pattern, tau: float, generator: torch.Generator
) -> torch.Tensor:
    """Soft masks in [0, 1]; every group sums to N; differentiable in the logits.

    q = softmax((P l + Gumbel) / tau), mask = q P: as tau -> 0 a draw from the conditional Bernoulli
    distribution. With more than `MOST_PATTERNS`, noise is added per weight: the mask is the inclusion
    probability at (l + Gumbel) / tau, and as tau -> 0 a Plackett-Luce draw.
    """
    if pattern.count > MOST_PATTERNS:
        noisy_GM = logits_GM + _gumbel(logits_GM.shape, logits_GM, generator)
        return ConditionalBernoulli(noisy_GM / tau, pattern.n).inclusion()
    patterns_KM = all_patterns(pattern).to(logits_GM)
    # groups last: a softmax over the first dimension is four times as fast on a CPU
    noise_KG = _gumbel((pattern.count, len(logits_GM)), logits_GM, generator)
    energy_KG = torch.addmm(noise_KG, patterns_KM, logits_GM.T, beta=1 / tau, alpha=1 / tau)
    q_KG = torch.softmax(energy_KG, dim=0)
    # subnormal masks such as 1e-40 slow a convolution on a CPU tenfold
    q_KG = torch.nn.functional.threshold(q_KG, NEGLIGIBLE, 0.0)
    return q_KG.T @ patterns_KM


def temperature(tau: tuple[float, float], progress: float) -> float:
    """Geometric from first to last."""
    first, last = tau
    return float(first * (last / first) ** progress)


def _gumbel(shape: tuple[int, ...], like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Standard Gumbel noise, -log(-log u), always finite."""
    noise = torch.empty(shape, dtype=like.dtype, device=like.device)
    # torch's exponential_ takes three times as long on a CPU
    noise.uniform_(generator=generator).clamp_min_(torch.finfo(like.dtype).tiny)
    return noise.log_().neg_().log_().neg_()


RELAXED = Method(lambda options: RelaxedPatterns(options.relaxed.tau), lr=0.3, logits=1.0)
