"""What a network is asked, and how its answer counts: the one currency of every method.

A task is a seeded, endless stream of problems: problem p is a function of (seed, p) alone. Methods read
batches of them and know nothing of images, noise or text.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from prunedm.architecture import Inputs, answer

Measure = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # answers, targets => (N,)


@dataclass(frozen=True)
class Criterion:
    """How an answer counts: its loss against the data's target, its distance from another answer."""

    losses: Measure
    distances: Measure


def squared_errors(answer: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean squared error of each problem, in float32: (N,). A target has no variance, or both do."""
    prediction = without_variance(answer, target).float()
    return F.mse_loss(prediction, target.float(), reduction="none").flatten(1).mean(1)


def without_variance(answer: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The prediction in an answer: of twice the channels of `like` the first half.

    The rest interpolates the logarithm of the sampler's variance (Nichol & Dhariwal 2021).
    `like`: the noisy data or the target.
    """
    channels = like.shape[1]
    return answer[:, :channels] if answer.shape[1] == 2 * channels else answer


SQUARED_ERROR = Criterion(squared_errors, squared_errors)


@dataclass(frozen=True)
class Batch:
    """N problems: what the network is told, what it should answer, and how noisy each is.

    target: (N, ...). level_N: 0 clean to 1 noise alone, zeros where nobody says; float64, and on the CPU
    wherever the rest is. numbers: which problems of their stream these are.
    """

    inputs: Inputs
    target: torch.Tensor
    level_N: torch.Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    numbers: tuple[int, ...] = ()
    criterion: Criterion = SQUARED_ERROR

    def __post_init__(self) -> None:
        if not len(self.level_N):
            object.__setattr__(self, "level_N", torch.zeros(len(self), dtype=torch.float64))

    def __len__(self) -> int:
        return len(self.target)

    def losses(self, answer: torch.Tensor) -> torch.Tensor:
        """The loss of each problem, (N,), in float32."""
        return self.criterion.losses(answer, self.target)

    def distances(self, answer: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        """How far an answer is from another network's, for each problem: (N,), in float32."""
        return self.criterion.distances(answer, wanted)

    def to(self, device: torch.device | str) -> "Batch":
        inputs = {name: tensor.to(device) for name, tensor in self.inputs.items()}
        return replace(self, inputs=inputs, target=self.target.to(device))

    def rows(self, rows: Sequence[int]) -> "Batch":
        """These problems of the batch, in this order."""
        return replace(
            self,
            inputs={name: tensor[rows] for name, tensor in self.inputs.items()},
            target=self.target[rows],
            level_N=self.level_N[rows],
            numbers=tuple(self.numbers[row] for row in rows) if self.numbers else (),
        )

    def cat(self, other: "Batch") -> "Batch":
        """These problems, and the others behind them."""
        return replace(
            self,
            inputs={name: torch.cat([x, other.inputs[name]]) for name, x in self.inputs.items()},
            target=torch.cat([self.target, other.target]),
            level_N=torch.cat([self.level_N, other.level_N]),
            numbers=(*self.numbers, *other.numbers),
        )


def predict(network: nn.Module, batch: Batch) -> torch.Tensor:
    """The network's answer to a batch of problems, (N, ...), without a learned variance."""
    return without_variance(answer(network, batch.inputs), batch.target)


@dataclass(frozen=True)
class Times:
    """Steps first..last of `steps` noise levels, 0 the cleanest: those that problems are drawn at."""

    first: int = 0
    last: int = 0
    steps: int = 1  # T


class Task(ABC):
    """A seeded, endless stream of problems."""

    times = Times()

    @abstractmethod
    def batch(self, numbers: Sequence[int]) -> Batch:
        """The problems of these numbers, on the CPU."""

    def batches(self, number_lists: Sequence[Any], *, workers: int = 0) -> Iterator[Batch]:
        """One batch a list of numbers, in order; what is slow to read, `workers` processes read."""
        return map(self.batch, number_lists)

    def sweep(self, count: int) -> Iterator[Batch]:
        """Problems 0..count-1 at each noise level in turn, cleanest first."""
        yield self.batch(range(count))

    def stream(self, count: int, *, size: int = 64) -> "Stream":
        """Problems 0..count-1 in batches, each drawn when it is asked for."""
        return Stream(self, count, size)


@dataclass(frozen=True)
class Stream(Sequence[Batch]):
    """Batches of problems 0..total-1, as often as wanted; none is kept."""

    task: Task
    total: int
    size: int

    def __len__(self) -> int:
        return math.ceil(self.total / self.size)

    def __getitem__(self, k: Any) -> Any:
        if not 0 <= k < len(self):
            raise IndexError(k)
        return self.task.batch(range(k * self.size, min((k + 1) * self.size, self.total)))
