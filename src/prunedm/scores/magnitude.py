"""Magnitude (Han et al. 2015, "Learning both weights and connections")."""

import torch

from prunedm.scores.score import Score


def magnitude(weight: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    """|w|: channels are compared by their L1 norm."""
    return weight.abs()


def magnitude_l2(weight: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    """w^2: single weights rank as by |w|, channels by their L2 norm."""
    return weight.square()


MAGNITUDE = Score(magnitude)
MAGNITUDE_L2 = Score(magnitude_l2)
