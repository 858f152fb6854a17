"""Fluctuation (An et al. 2024, "Fluctuation-based adaptive structured pruning", arXiv:2312.11983).

Wanda with the inputs' mean taken out: after SiLU most of E[x^2] is a mean, whose loss is a constant
that the next norm takes away in part. `docs/log.md` has what that is worth.
"""

import torch

from prunedm.scores.score import Score


def fluctuation(weight: torch.Tensor, input_variance: torch.Tensor) -> torch.Tensor:
    """|w| * sqrt(Var x), x the inputs that this weight meets: per channel, and tap of a kernel."""
    return weight.abs() * input_variance.sqrt().to(weight.dtype)


FLUCTUATION = Score(fluctuation, "input variance")
