"""What matters: a score per weight, higher = keep. Any score works with any mechanism.

A score is a small pure function of a layer's weight and one statistic of it. To add one: a file with
a `Score`, and a line in `tables.SCORES`. A score may be signed: mechanisms sum it over the weights
that go together, and compare absolute values.
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
from prunedm.scores import diff_pruning, wanda
from prunedm.scores.score import Score
from prunedm.tables import Table
from prunedm.task import Batch, Stream, Task

Statistics = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Calibration:
    """The problems that scores are measured on, and how their statistics are taken."""

    problems: Task
    count: int = 512
    batch_size: int = 64
    time_bins: int = 10  # wanda
    over_time: str = "mean"  # wanda: of OVER_TIME
    over_problems: OverProblems = "mean"  # wanda: within a time bin
    sweep_images: int = 16  # diff-pruning: the one batch that goes through the timesteps
    stop_below: float = 0.05  # diff-pruning: share of the largest loss
    device: torch.device | str = "cpu"

    @property
    def batches(self) -> Stream:
        return self.problems.stream(self.count, size=self.batch_size)


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

    Raises `UserError` for calibration images of another shape than the model's, and for a score
    that is not finite.
    """
    score = SCORES[name]
    weights = {n: weight_of(layer).detach().cpu() for n, layer in layers.items()}
    if score.needs_problems:
        assert calibration is not None, f"{name} needs problems"
        _check_shape(denoiser, calibration.problems.batch([0]))
        statistics = _STATISTICS[score.statistic](denoiser, layers, calibration, progress)
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
    """Raise `UserError` where problems have another shape than the network was trained on."""
    if getattr(getattr(network, "config", None), "sample_size", None) is None:  # it takes any
        return
    wanted = architecture_of(network).shape(network)
    given = tuple(problems.inputs["sample"].shape[1:])
    if given != wanted:
        shapes = ["x".join(map(str, shape)) for shape in (given, wanted)]
        raise UserError(
            f"calibration images are {shapes[0]}, the model takes {shapes[1]}; resize them"
        )


def _input_norms(
    denoiser: nn.Module,
    layers: Mapping[str, nn.Module],
    calibration: Calibration,
    progress: Progress | None,
) -> Statistics:
    problems = calibration.problems
    squares = input_squares(
        denoiser,
        layers,
        calibration.batches,
        bins=TimeBins.over(problems.times, calibration.time_bins),
        over_problems=calibration.over_problems,
        device=calibration.device,
        progress=progress,
    )
    return {
        n: for_weight(layers[n], wanda.OVER_TIME[calibration.over_time](squares_B.sqrt()))
        for n, squares_B in squares.items()
    }


def _gradients(
    denoiser: nn.Module,
    layers: Mapping[str, nn.Module],
    calibration: Calibration,
    progress: Progress | None,
) -> Statistics:
    return loss_gradients(
        denoiser, layers, calibration.batches, device=calibration.device, progress=progress
    )


def _low_noise_gradients(
    denoiser: nn.Module,
    layers: Mapping[str, nn.Module],
    calibration: Calibration,
    progress: Progress | None,
) -> Statistics:
    return diff_pruning.low_noise_gradients(
        denoiser,
        layers,
        calibration.problems,
        images=calibration.sweep_images,
        threshold=calibration.stop_below,
        device=calibration.device,
        progress=progress,
    )


def _input_variances(
    denoiser: nn.Module,
    layers: Mapping[str, nn.Module],
    calibration: Calibration,
    progress: Progress | None,
) -> Statistics:
    variances = input_variances(
        denoiser, layers, calibration.batches, device=calibration.device, progress=progress
    )
    return {n: for_weight(layers[n], variance) for n, variance in variances.items()}


_STATISTICS = {
    "gradient": _gradients,
    "low-noise gradient": _low_noise_gradients,
    "input norm": _input_norms,
    "input variance": _input_variances,
}
