"""Random: the floor that every other score has to beat."""

import torch

from prunedm.scores.score import Score


def random(_: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """A seeded uniform draw per weight."""
    return noise


RANDOM = Score(random, "noise")
