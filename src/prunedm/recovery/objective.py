"""What fine-tuning aims at: the data, and the dense teacher by its output, blocks and sensitivity.

Output distillation (Hinton et al. 2015) pulls to the same optimum as the data: the teacher's output
is the data target's mean as the dense model knows it, without the noise that the data target
carries.
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

    F and S are relative errors (`feature_losses`, `sensitivity_losses`). S is taken on one pair of
    problems of `every`, `size` away from them, along directions that `seed` decides. `reordered`:
    the student's channels stand in another order than the teacher's.
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
    """The objective of this mixture; while it is open, both networks' blocks may be listened to.

    Every term is a mean over problems, so several processes with a share of a batch each have the
    mean of their gradients in common with one process.
    outputs: the teacher's, where they may be known already. Raises `UserError` where features are
    to be matched between networks of other blocks.
    """
    if not (mixture.features or mixture.sensitivity):
        known = outputs or (lambda batch: answer(teacher, batch.inputs))
        yield partial(_plain, outputs=known, share=mixture.output)
        return
    if mixture.features and block_names(student) != block_names(teacher):
        raise UserError("match_features: the teacher has other blocks; give --match-features 0")
    networks = (student, teacher) if mixture.features else ()
    with ExitStack() as stack:
        watched = [stack.enter_context(block_outputs(network)) for network in networks]
        yield partial(_mixed, teacher=teacher, mixture=mixture, watched=watched)


def _plain(
    student: nn.Module, batch: Batch, _: int, *, outputs: Outputs, share: float
) -> torch.Tensor:
    """One pass of the student; the teacher's output alone."""
    output_NCHW = answer(student, batch.inputs)
    data = batch.losses(output_NCHW).mean()
    if share == 0:
        return data
    with torch.no_grad():
        wanted_NCHW = outputs(batch)
    return (1 - share) * data + share * batch.distances(output_NCHW, wanted_NCHW).mean()


def _mixed(
    student: nn.Module,
    batch: Batch,
    _: int,
    *,
    teacher: nn.Module,
    mixture: Mixture,
    watched: list[BlockOutputs],
) -> torch.Tensor:
    """One pass of each network over the problems and the perturbed copies behind them."""
    count = len(batch)
    rows = perturbed_rows(batch, mixture.every) if mixture.sensitivity else []
    joined = with_perturbed(batch, rows, seed=mixture.seed, size=mixture.size)
    with torch.no_grad():
        wanted_NCHW = answer(teacher, joined.inputs)
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
