"""The denoising loss on fixed problems: the same images, timesteps and noise for every model."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from prunedm.errors import NotFinite
from prunedm.evaluation.metric import Measurement, Metric, Subject, fixed
from prunedm.networks.inference import evaluating
from prunedm.progress import Progress, Silent
from prunedm.task import Batch, Stream, Task, predict

BATCH = 100
LOSSES = "losses.npy"
MOST_VALUES = 2**21  # in one streamed batch: images x pixels x channels


@dataclass(frozen=True)
class LossEstimate:
    """Mean over problems, its standard error, and the losses themselves (N,)."""

    mean: float
    standard_error: float
    per_problem_N: torch.Tensor

    @classmethod
    def of(cls, losses_N: torch.Tensor) -> "LossEstimate":
        # problems come in antithetic pairs (t, T-1-t); pairs are independent, their members are not
        pairs = losses_N[: len(losses_N) // 2 * 2].double().reshape(-1, 2).mean(1)
        error = float(pairs.std() / len(pairs) ** 0.5) if len(pairs) > 1 else float("nan")
        return cls(float(losses_N.double().mean()), error, losses_N)


def fixed_batches(problems: Task, count: int) -> list[Batch]:
    """Problems 0..count-1, drawn once and kept, for a loss that is computed many times."""
    size = problems.fitting(BATCH)
    return [problems.batch(range(k, min(k + size, count))) for k in range(0, count, size)]


def streamed_batches(problems: Task, count: int, size: int) -> Stream:
    """Problems 0..count-1, drawn on demand: `size` at a time, or as many as `MOST_VALUES` allows."""
    fitting = max(1, MOST_VALUES // problems.batch([0]).target.numel())
    return problems.stream(count, size=min(problems.fitting(size), fitting))


@torch.no_grad()
def denoising_loss(
    denoiser: nn.Module,
    batches: Sequence[Batch],
    *,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> LossEstimate:
    """The loss of `denoiser` over these batches, in its own dtype and without dropout.

    Raises `NotFinite` where a loss is NaN or infinite.
    """
    losses = []
    task = (progress or Silent()).task("held-out loss", len(batches))
    with evaluating(denoiser), task as bar:
        for cpu_batch in batches:
            batch = cpu_batch.to(device)
            losses.append(batch.losses(predict(denoiser, batch)).cpu())
            bar.advance()
    losses_N = torch.cat(losses)
    _check_finite(losses_N)
    return LossEstimate.of(losses_N)


def _check_finite(losses_N: torch.Tensor) -> None:
    broken = (~losses_N.isfinite()).nonzero().flatten()
    if len(broken):
        first = int(broken[0])
        raise NotFinite(
            f"the held-out loss is {float(losses_N[first])} on {len(broken)} of {len(losses_N)} "
            f"problems, first number {first}: the model's weights or its noise schedule are broken"
        )


def _figures(of: Subject) -> dict[str, float]:
    """The loss; the losses of all problems go to a file."""
    loss = denoising_loss(of.denoiser, of.problems(), device=of.device, progress=of.progress)
    np.save(of.folder / LOSSES, loss.per_problem_N.numpy(), allow_pickle=False)
    text = {"perplexity": math.exp(loss.mean)} if of.text else {}
    return {"loss": loss.mean, "loss_se": loss.standard_error, **text}


MEASURED = Measurement("loss", "problems", _figures)
LOSS = Metric(
    "loss",
    "loss",
    "mean loss on the held-out problems (of denoising: squared error, of texts: cross-entropy a token) "
    "± its standard error",
    fixed(4),
    MEASURED,
    spread="loss_se",
    change="loss_change",
    conditions="Loss: {problems} held-out problems of {dataset}, drawn with seed {seed}; the same for "
    "every model. The ± is one standard error.",
)
