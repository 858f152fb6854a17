"""Magnitude (Han et al. 2015, "Learning both weights and connections")."""

import torch


def magnitude(weight: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    """|w|"""
    return weight.abs()
