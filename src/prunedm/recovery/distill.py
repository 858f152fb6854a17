"""Output distillation (Hinton et al. 2015): the teacher's prediction on the same noisy input."""

import torch
from torch import nn

from prunedm.diffusion import ProblemBatch, predict, problem_losses
from prunedm.training.loop import Objective


def recovery_objective(teacher: nn.Module | None, share: float) -> Objective:
    """(1 - share) * |output - data|^2 + share * |output - teacher|^2; only data without a teacher.

    Both pull to the same optimum: the teacher's output is the data target's mean as the dense model
    knows it, without the noise that the data target carries.
    """

    def objective(student: nn.Module, batch: ProblemBatch, _: int) -> torch.Tensor:
        output = predict(student, batch)
        data = problem_losses(output, batch.target_NCHW).mean()
        if teacher is None or share == 0:
            return data
        with torch.no_grad():
            wanted = predict(teacher, batch)
        return (1 - share) * data + share * problem_losses(output, wanted).mean()

    return objective
