"""Sensitivity matching: student and teacher respond equally to small changes of the noisy image.

After 2ndMatch (CVPR 2026), which matches J_s^T J_s v with J_t^T J_t v. Here the Jacobian-vector
products J v are matched by finite differences: equal J v along all v imply equal J^T J v, and cost
one forward and backward pass of the perturbed problems instead of a double backward pass.
"""

from dataclasses import replace

import torch

from prunedm.randomness import generator_for
from prunedm.task import Batch

_TINY = 1e-12


def perturbed_rows(batch: Batch, every: int) -> list[int]:
    """Rows of the problems to perturb: one antithetic pair (2k, 2k + 1) in `every`.

    Chosen by the problems' numbers, whatever the batches.
    """
    return [row for row, number in enumerate(batch.numbers) if number // 2 % every == 0]


def directions(batch: Batch, rows: list[int], seed: int) -> torch.Tensor:
    """A standard normal v for each of the rows' problems, by its number: (M, C, H, W)."""
    shape, device = batch.inputs["sample"].shape[1:], batch.inputs["sample"].device
    drawn = [
        torch.randn(shape, generator=generator_for(seed, "direction", batch.numbers[row]))
        for row in rows
    ]
    return torch.stack(drawn).to(device)


def with_perturbed(batch: Batch, rows: list[int], *, seed: int, size: float) -> Batch:
    """The N problems, followed by copies of M `rows` at x + size * v, for a single pass."""
    if not rows:
        return batch
    copies = batch.rows(rows)
    moved_MCHW = copies.inputs["sample"] + size * directions(batch, rows, seed)
    return batch.cat(replace(copies, inputs={**copies.inputs, "sample": moved_MCHW}))


def responses(output_NCHW: torch.Tensor, rows: list[int], *, size: float) -> torch.Tensor:
    """One-sided finite differences (f(x + size v) - f(x)) / size: (M, C, H, W).

    output: of `with_perturbed`, so M rows longer than the batch.
    """
    output_NCHW = output_NCHW.to(torch.promote_types(output_NCHW.dtype, torch.float32))
    count = len(output_NCHW) - len(rows)
    return (output_NCHW[count:] - output_NCHW[:count][rows]) / size


def sensitivity_losses(student_MCHW: torch.Tensor, teacher_MCHW: torch.Tensor) -> torch.Tensor:
    """|J_s v - J_t v|^2 / |J_t v|^2 of each perturbed problem: (M,).

    Relative, because for predicted noise |J| grows like 1 / sigma_t as the noise falls.
    """
    apart_M = (student_MCHW - teacher_MCHW).square().sum((1, 2, 3))
    return apart_M / teacher_MCHW.square().sum((1, 2, 3)).clamp_min(_TINY)
