"""What matters: a score per weight, higher = keep. Any score works with any mechanism.

A score is a small pure function of a layer's weight and one statistic of the layer. To add one, write
a file with a `Score` and add a line to `tables.SCORES`. A score may be signed: mechanisms sum it over
the weights that are removed together, and compare absolute values.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from prunedm import tables
from prunedm.architecture import architecture_of
from prunedm.calibration import (
    OverProblems,
    TimeBins,
    input_squares,
    input_variances,
    loss_gradients,
)
from prunedm.errors import UserError
from prunedm.networks.layer_kinds import for_weight, weight_of
from prunedm.progress import Progress
from prunedm.randomness import generator_for
from prunedm.scores.score import Score
from prunedm.scores.wanda import OVER_TIME
from prunedm.tables import Table
from prunedm.task import Batch, Stream, Task


@dataclass(frozen=True)
class Calibration:
    """The problems on which scores are measured, and how their statistics are taken."""

    problems: Task
    count: int = 512
    batch_size: int = 64
    time_bins: int = 10  # wanda
    over_time: str = "mean"  # wanda: a name in OVER_TIME
    over_problems: OverProblems = "mean"  # wanda: within a time bin
    sweep_images: int = 16  # diff-pruning: size of the batch that visits all timesteps
    stop_below: float = 0.05  # diff-pruning: share of the largest loss

    @property
    def batches(self) -> Stream:
        return self.problems.stream(self.count, size=self.problems.fitting(self.batch_size))


SCORES: Table[Score] = tables.SCORES


def score_layers(
    denoiser: nn.Module,
    layers: Mapping[str, nn.Module],
    name: str,
    *,
    calibration: Calibration | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, torch.Tensor]:
    """The score of every weight of every layer, each as [O, I, *taps], on the CPU.

    Raises `UserError` for calibration images whose shape is not the model's, and for scores that
    are not finite.
    """
    score = SCORES[name]
    weights = {n: weight_of(layer).detach().cpu() for n, layer in layers.items()}
    if score.needs_problems:
        assert calibration is not None, f"{name} needs problems"
        _check_shape(denoiser, calibration.problems.batch([0]))
        statistics = _statistics(score, denoiser, layers, calibration, progress)
    elif score.statistic == "noise":
        statistics = {
            n: torch.rand(w.shape, generator=generator_for(seed, f"score/{n}"))
            for n, w in weights.items()
        }
    else:
        statistics = weights
    scores = {n: score.function(weight, statistics[n]) for n, weight in weights.items()}
    for n, values in scores.items():
        if not bool(torch.isfinite(values.sum(dtype=torch.float64))):
            raise UserError(
                f"{name}: the scores of {n} are not finite; is its weight, or the data?"
            )
    return scores


def _check_shape(network: nn.Module, problems: Batch) -> None:
    """Raise `UserError` where the problems' shape is not the one the network was trained on."""
    if getattr(getattr(network, "config", None), "sample_size", None) is None:  # takes any shape
        return
    wanted = architecture_of(network).shape(network)
    given = tuple(problems.inputs["sample"].shape[1:])
    if given != wanted:
        shapes = ["x".join(map(str, shape)) for shape in (given, wanted)]
        raise UserError(
            f"calibration images are {shapes[0]}, the model takes {shapes[1]}; resize them"
        )


def _statistics(
    score: Score,
    denoiser: nn.Module,
    layers: Mapping[str, nn.Module],
    calibration: Calibration,
    progress: Progress | None,
) -> dict[str, torch.Tensor]:
    """What the score wants to know of each layer, in a shape that broadcasts with its weight."""
    problems, batches = calibration.problems, calibration.batches
    if score.statistic == "gradient":
        return loss_gradients(denoiser, layers, batches, progress=progress)
    if score.statistic == "low-noise gradient":
        return loss_gradients(
            denoiser,
            layers,
            problems.sweep(calibration.sweep_images),
            stop_below=calibration.stop_below,
            total=problems.times.last - problems.times.first + 1,
            progress=progress,
        )
    if score.statistic == "input variance":
        found = input_variances(denoiser, layers, batches, progress=progress)
    else:
        squares = input_squares(
            denoiser,
            layers,
            batches,
            bins=TimeBins.over(problems.times, calibration.time_bins),
            over_problems=calibration.over_problems,
            progress=progress,
        )
        combine = OVER_TIME[calibration.over_time]
        found = {n: combine(squares_B.sqrt()) for n, squares_B in squares.items()}
    return {n: for_weight(layers[n], values) for n, values in found.items()}
