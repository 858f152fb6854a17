"""Diff-Pruning (Fang et al. 2023, "Structural pruning for diffusion models", arXiv:2305.10924).

Taylor summed over t = 0, 1, 2, ... on one fixed batch and noise, up to the first timestep whose loss
is below a share of the largest so far (eq. 6: L_t / L_max > T). Late, noisy steps have small losses and
gradients that only blur the score.
"""

from collections.abc import Mapping

import torch
from torch import nn

from prunedm.calibration import loss_gradients
from prunedm.progress import Progress
from prunedm.scores.score import Score
from prunedm.scores.taylor import taylor
from prunedm.task import Task

DIFF_PRUNING = Score(taylor, "low-noise gradient")


def low_noise_gradients(
    denoiser: nn.Module,
    layers: Mapping[str, nn.Module],
    problems: Task,
    *,
    images: int = 16,
    threshold: float = 0.05,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> dict[str, torch.Tensor]:
    """Gradients over the first timesteps, until loss < threshold * largest loss so far."""
    return loss_gradients(
        denoiser,
        layers,
        problems.sweep(images),
        stop_below=threshold,
        total=problems.times.last - problems.times.first + 1,
        device=device,
        progress=progress,
    )
