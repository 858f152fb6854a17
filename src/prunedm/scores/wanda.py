"""Wanda (Sun et al. 2023, "A simple and effective pruning approach for large language models")."""

import torch


def wanda(weight: torch.Tensor, input_square_mean: torch.Tensor) -> torch.Tensor:
    """|w| * sqrt(E[x^2]), x the input that this weight meets: per channel, and tap of a kernel."""
    return weight.abs() * input_square_mean.sqrt().to(weight.dtype)
