"""Relaxed N:M patterns (after MaskLLM, Fang et al. 2024), with one additive logit per weight.

MaskLLM keeps one logit per pattern, K = C(M, N) of them a group. Here pattern k has the sum of its
members' logits, so a group has M: for 2:4, 4 numbers in place of 6; for 4:8, 8 in place of 70.
The family is P(S) = exp(sum_{i in S} l_i) / Z, the conditional Bernoulli distribution.
"""

from collections.abc import Mapping
from itertools import combinations
from math import comb

import torch
from torch import nn

from prunedm.errors import UserError
from prunedm.layers import from_groups, to_groups
from prunedm.masks import Masks, Pattern
from prunedm.removal.nm import nm_mask

MOST_PATTERNS = 256  # memory is K numbers a group
NEGLIGIBLE = 1e-6  # a pattern's share below which it counts as absent


class RelaxedMasks(nn.Module):
    """Logits over all groups of all layers in one (G, M) parameter, and soft masks drawn from them."""

    patterns_KM: torch.Tensor

    def __init__(
        self, initial: Masks, scores: Mapping[str, torch.Tensor], *, strength: float
    ) -> None:
        super().__init__()
        assert initial.pattern is not None
        self.pattern = initial.pattern
        self.register_buffer("patterns_KM", all_patterns(initial.pattern))
        self.shapes = {name: mask.shape for name, mask in initial}
        logits = [
            _first_logits(mask, scores[name], initial.pattern.m, strength) for name, mask in initial
        ]
        self.logits = nn.Parameter(torch.cat(logits))

    def forward(self, tau: float, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Soft masks in [0, 1] by layer; every group sums to N; differentiable in the logits.

        q = softmax((P l + Gumbel) / tau), mask = q P; hard as tau -> 0.
        """
        energy_GK = self.logits @ self.patterns_KM.T
        gumbel_GK = torch.empty_like(energy_GK).exponential_(generator=generator).log_().neg_()
        q_GK = torch.softmax((energy_GK + gumbel_GK) / tau, dim=1)
        # a soft mask of 1e-40 is subnormal, and slows a convolution on a CPU tenfold
        q_GK = nn.functional.threshold(q_GK, NEGLIGIBLE, 0.0)
        return self._by_layer(q_GK @ self.patterns_KM)

    def mode(self) -> Masks:
        """The most probable masks: in each group the N largest logits."""
        logits = self._by_layer(self.logits.detach())
        by_layer = {n: nm_mask(value, self.pattern) for n, value in logits.items()}
        return Masks.uniform(by_layer, self.pattern)

    def _by_layer(self, groups_GM: torch.Tensor) -> dict[str, torch.Tensor]:
        sizes = [shape.numel() // self.pattern.m for shape in self.shapes.values()]
        parts = groups_GM.split(sizes)
        return {
            name: from_groups(part, shape)
            for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }


def all_patterns(pattern: Pattern) -> torch.Tensor:
    """(K, M) floats: every way to keep N of M."""
    count = comb(pattern.m, pattern.n)
    if count > MOST_PATTERNS:
        raise UserError(f"{pattern} has {count} patterns a group, relaxation takes {MOST_PATTERNS}")
    table = torch.zeros(count, pattern.m)
    for row, kept in enumerate(combinations(range(pattern.m), pattern.n)):
        table[row, list(kept)] = 1
    return table


def temperature(tau: tuple[float, float], step: int, steps: int) -> float:
    """Geometric from first to last."""
    first, last = tau
    return float(first * (last / first) ** (step / max(1, steps - 1)))


def _first_logits(mask: torch.Tensor, score: torch.Tensor, m: int, strength: float) -> torch.Tensor:
    """The first mask leads by `strength`; the score, as its share of the group, breaks ties.

    The share counts for less than `strength`, or it would overrule a mask that another score made.
    """
    score_GM = to_groups(score.float(), m)
    share_GM = score_GM / score_GM.sum(1, keepdim=True).clamp_min(1e-12)
    weight = min(1.0, 0.99 * strength)
    return (strength * to_groups(mask, m).float() + weight * share_GM).contiguous()
