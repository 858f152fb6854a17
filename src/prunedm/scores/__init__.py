"""What matters: a score per weight, higher = keep. Any score works with any mechanism.

A score is a small pure function of a layer's weight and statistics. To add one: a file, and a line
in `SCORES`.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from prunedm.calibration import input_square_means, loss_gradients
from prunedm.diffusion import ProblemBatch
from prunedm.progress import Progress
from prunedm.randomness import generator_for
from prunedm.scores.magnitude import magnitude
from prunedm.scores.random import random
from prunedm.scores.taylor import taylor
from prunedm.scores.wanda import wanda


@dataclass(frozen=True)
class Score:
    """`function(weight, statistic)`, and the statistic it wants: nothing, noise, gradient, inputs."""

    function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    statistic: str

    @property
    def needs_problems(self) -> bool:
        return self.statistic in ("gradient", "inputs")


SCORES = {
    "magnitude": Score(magnitude, "nothing"),
    "random": Score(random, "noise"),
    "taylor": Score(taylor, "gradient"),
    "wanda": Score(wanda, "inputs"),
}


def score_layers(
    denoiser: nn.Module,
    layers: Mapping[str, nn.Module],
    name: str,
    *,
    batches: Iterable[ProblemBatch] = (),
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, torch.Tensor]:
    """The score of every weight of every layer, each of its weight's shape."""
    score = SCORES[name]
    weights = {n: layer.get_parameter("weight").detach() for n, layer in layers.items()}
    if score.statistic == "gradient":
        statistics = loss_gradients(denoiser, layers, batches, progress=progress)
    elif score.statistic == "inputs":
        statistics = input_square_means(denoiser, layers, batches, progress=progress)
    elif score.statistic == "noise":
        statistics = {
            n: torch.rand(w.shape, generator=generator_for(seed, f"score/{n}"))
            for n, w in weights.items()
        }
    else:
        statistics = weights
    return {n: score.function(weight, statistics[n]) for n, weight in weights.items()}
