"""analyze: activations at each noise level, and whether a score that uses them would help."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prunedm.calibration import TimeBins, input_squares, input_variances
from prunedm.evaluation.activations import (
    Activations,
    ScoreTrial,
    heat_map,
    layer_activations,
    verdict,
)
from prunedm.evaluation.loss import LossEstimate, denoising_loss
from prunedm.folder import Model
from prunedm.masks import Pattern
from prunedm.networks.layers import prunable_layers
from prunedm.options import AnalyzeOptions, ScoreOptions
from prunedm.progress import Progress
from prunedm.record import write_json
from prunedm.removal.nm import eligible_layers, nm_masks
from prunedm.stages.frame import Plan, Request
from prunedm.stages.inputs import (
    DataSet,
    calibration_problems,
    device_for,
    held_out_problems,
    read_inputs,
    score_weights,
    time_bins,
)

TRIED = ("magnitude", "wanda", "fluctuation")


def analyze(request: Request[AnalyzeOptions]) -> Plan:
    """Write `activations.json` and the heat map `activations.png`; the model stays as it is."""
    options, progress = request.options, request.progress
    model, data, inputs = read_inputs(request)
    eligible_layers(  # raises where none is, before any work
        prunable_layers(model.denoiser, options.targets), Pattern.parse(options.pattern)
    )

    def make(folder: Path) -> dict[str, Any]:
        found = _activations(model, data, options, progress)
        trial = _trial(model, data, options, progress)
        figures = {"verdict": verdict(found, trial), "trial": trial.model_dump()}
        write_json(figures | found.model_dump(), folder / "activations.json")
        heat_map(found, folder / "activations.png")
        return figures | {"outlier_ratio": found.outlier_ratio, "mean_share": found.mean_share}

    return Plan(options=options, inputs=inputs, parent=model.record, make=make)


def _activations(
    model: Model, data: DataSet, options: AnalyzeOptions, progress: Progress
) -> Activations:
    device = device_for(options.device)
    denoiser = model.denoiser.to(device)
    layers = prunable_layers(denoiser, options.targets)
    problems = calibration_problems(model, options, data)
    bins = TimeBins.over(problems.times, time_bins(model, options))
    batches = problems.stream(options.calibration_problems, size=options.calibration_batch)
    squares = input_squares(denoiser, layers, batches, bins=bins, progress=progress)
    variances = input_variances(denoiser, layers, batches, progress=progress)
    return Activations(
        bins=bins.edges,
        outlier=options.outlier,
        layers={
            name: layer_activations(squares[name], variances[name], outlier=options.outlier)
            for name in layers
        },
    )


def _trial(model: Model, data: DataSet, options: AnalyzeOptions, progress: Progress) -> ScoreTrial:
    """The loss of copies pruned by each score, against the dense model's."""
    device = device_for(options.device)
    held_out = held_out_problems(model, options, options.problems)
    dense = denoising_loss(model.denoiser.to(device), held_out, device=device)
    shared = {k: v for k, v in options if k in ScoreOptions.model_fields}
    pattern, losses = Pattern.parse(options.pattern), dict[str, LossEstimate]()
    for score in TRIED:
        layers = prunable_layers(model.denoiser, options.targets)
        wanted = ScoreOptions(**shared, score=score)
        scores = score_weights(model, layers, wanted, data, progress=progress)
        pruned: nn.Module = deepcopy(model.denoiser)
        nm_masks(layers, scores, pattern).apply_(pruned)
        losses[score] = denoising_loss(pruned, held_out, device=device)
    model.denoiser.to(torch.device("cpu"))
    return ScoreTrial(
        pattern=options.pattern,
        dense=dense.mean,
        losses={score: loss.mean for score, loss in losses.items()},
        standard_error={
            score: LossEstimate.of(
                loss.per_problem_N - losses["magnitude"].per_problem_N
            ).standard_error
            for score, loss in losses.items()
        },
    )
