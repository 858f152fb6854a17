"""Wanda (Sun et al. 2023, "A simple and effective pruning approach for large language models").

A diffusion model meets other activations at every noise level, so their norms are taken per time bin
and then combined. Shapes: B time bins, noisiest last.

Fluctuation (An et al. 2024, "Fluctuation-based adaptive structured pruning", arXiv:2312.11983) is
Wanda without the inputs' mean: after SiLU most of E[x^2] is the mean, whose removal adds a constant
that the next norm partly cancels. `docs/log.md` has the measured gain.
"""

from collections.abc import Callable

import torch

from prunedm.scores.score import Score


def wanda(weight: torch.Tensor, input_norm: torch.Tensor) -> torch.Tensor:
    """|w| * |x|, x the inputs that this weight multiplies: per channel and kernel tap."""
    return weight.abs() * input_norm.to(weight.dtype)


def fluctuation(weight: torch.Tensor, input_variance: torch.Tensor) -> torch.Tensor:
    """|w| * sqrt(Var x), x the inputs that this weight multiplies: per channel and kernel tap."""
    return weight.abs() * input_variance.sqrt().to(weight.dtype)


def weighted_mean(norms_B: torch.Tensor) -> torch.Tensor:
    """Mean with weights that fall linearly from the cleanest bin to the noisiest: B, ..., 2, 1."""
    weights_B = torch.arange(len(norms_B), 0, -1, dtype=norms_B.dtype, device=norms_B.device)
    return torch.tensordot(weights_B / weights_B.sum(), norms_B, dims=1)


# norms by time bin => one norm
OVER_TIME: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "mean": lambda norms_B: norms_B.mean(0),
    "max": lambda norms_B: norms_B.amax(0),
    "median": lambda norms_B: norms_B.quantile(0.5, dim=0),
    "weighted_mean": weighted_mean,
}

WANDA = Score(wanda, "input norm")
FLUCTUATION = Score(fluctuation, "input variance")
