"""Objectives of fine-tuning: the data, and the dense teacher's output, blocks and sensitivity.

Output distillation (Hinton et al. 2015) has the same optimum as the data: the teacher's output is its
estimate of the data target's mean, without the noise of the data target.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from prunedm.architecture import answer
from prunedm.errors import UserError
from prunedm.recovery.features import BlockOutputs, block_names, block_outputs, feature_losses
from prunedm.recovery.sensitivity import (
    perturbed_rows,
    responses,
    sensitivity_losses,
    with_perturbed,
)
from prunedm.task import Batch, predict
from prunedm.training.loop import Objective

Outputs = Callable[[Batch], torch.Tensor]  # the teacher's, NCHW


@dataclass(frozen=True)
class Mixture:
    """(1 - output) * data + output * teacher's output + features * F + sensitivity * S.

    F and S are relative errors (`feature_losses`, `sensitivity_losses`). S uses one pair of problems
    in `every`, perturbed by `size` along directions that `seed` decides. `reordered`: the student's
    channels are in another order than the teacher's.
    """

    output: float = 0.0
    features: float = 0.0
    sensitivity: float = 0.0
    every: int = 4
    size: float = 0.05
    seed: int = 0
    reordered: bool = False


def data_objective(module: nn.Module, batch: Batch, _: int = 0) -> torch.Tensor:
    """The denoising loss alone."""
    return batch.losses(predict(module, batch)).mean()


@contextmanager
def recovery_objective(
    student: nn.Module, teacher: nn.Module, mixture: Mixture, *, outputs: Outputs | None = None
) -> Iterator[Objective]:
    """The objective of this mixture; within the context, both networks' blocks may be recorded.

    Every term is a mean over problems, so the mean of the gradients of several processes, each with
    a share of the batch, is the gradient of one process.
    outputs: the teacher's outputs, for a mixture of outputs alone, where they may be cached. Raises
    `UserError` where features should match between networks with other blocks.
    """

    def answers(batch: Batch) -> torch.Tensor:
        return answer(teacher, batch.inputs)

    if mixture.features or mixture.sensitivity:
        outputs = None  # cached ones have neither blocks nor perturbed copies
    if mixture.features and block_names(student) != block_names(teacher):
        raise UserError("match_features: the teacher has other blocks; give --match-features 0")
    networks = (student, teacher) if mixture.features else ()
    with ExitStack() as stack:
        watched = [stack.enter_context(block_outputs(network)) for network in networks]
        yield partial(_mixed, outputs=outputs or answers, mixture=mixture, watched=watched)


def _mixed(
    student: nn.Module,
    batch: Batch,
    _: int,
    *,
    outputs: Outputs,
    mixture: Mixture,
    watched: list[BlockOutputs],
) -> torch.Tensor:
    """One pass of each network over the problems and, behind them, their perturbed copies."""
    if not (mixture.output or mixture.features or mixture.sensitivity):
        return data_objective(student, batch)
    count = len(batch)
    rows = perturbed_rows(batch, mixture.every) if mixture.sensitivity else []
    joined = with_perturbed(batch, rows, seed=mixture.seed, size=mixture.size)
    with torch.no_grad():
        wanted_NCHW = outputs(joined)
    output_NCHW = answer(student, joined.inputs)
    data = batch.losses(output_NCHW[:count]).mean()
    copy = batch.distances(output_NCHW[:count], wanted_NCHW[:count]).mean()
    loss = (1 - mixture.output) * data + mixture.output * copy
    if watched:
        own, wanted = (blocks.take(count) for blocks in watched)
        apart_N = feature_losses(own, wanted, reordered=mixture.reordered)
        loss = loss + mixture.features * apart_N.mean()
    if rows:
        pairs = (responses(o, rows, size=mixture.size) for o in (output_NCHW, wanted_NCHW))
        total = sensitivity_losses(*pairs).sum()
        loss = loss + mixture.sensitivity * total * mixture.every / count
    return loss
