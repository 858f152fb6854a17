"""Problems for a network, and how its answers are scored: the common interface of all methods.

A task is a seeded, endless stream of problems: problem p is a function of (seed, p) alone. Methods read
batches of problems and know nothing of images, noise or text.
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
from prunedm.randomness import generator_for

Measure = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # answers, targets => (N,)


@dataclass(frozen=True)
class Criterion:
    """How an answer is scored: loss against the data's target, distance from another answer."""

    losses: Measure
    distances: Measure


def squared_errors(answer: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean squared error of each problem, float32 (N,); an answer's learned variance is ignored."""
    prediction = without_variance(answer, target).float()
    return F.mse_loss(prediction, target.float(), reduction="none").flatten(1).mean(1)


def without_variance(answer: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The prediction in an answer: the first half where it has twice the channels of `like`.

    The other half interpolates the logarithm of the sampler's variance (Nichol & Dhariwal 2021).
    `like`: the noisy data or the target.
    """
    channels = like.shape[1]
    return answer[:, :channels] if answer.shape[1] == 2 * channels else answer


SQUARED_ERROR = Criterion(squared_errors, squared_errors)


@dataclass(frozen=True)
class Batch:
    """N problems: the network's inputs, the targets, and the noise levels.

    target: (N, ...). level_N: from 0 (clean) to 1 (pure noise), zeros by default; float64, always on
    the CPU. numbers: the problems' numbers in their stream.
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
        """Distance between an answer and another network's, for each problem: (N,), in float32."""
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
        """These problems followed by the others."""
        return replace(
            self,
            inputs={name: torch.cat([x, other.inputs[name]]) for name, x in self.inputs.items()},
            target=torch.cat([self.target, other.target]),
            level_N=torch.cat([self.level_N, other.level_N]),
            numbers=(*self.numbers, *other.numbers),
        )


def predict(network: nn.Module, batch: Batch) -> torch.Tensor:
    """The network's answer to a batch, (N, ...), without a learned variance."""
    return without_variance(answer(network, batch.inputs), batch.target)


@dataclass(frozen=True)
class Times:
    """Steps first..last, of `steps` noise levels (0 is the cleanest), at which problems are drawn."""

    first: int = 0
    last: int = 0
    steps: int = 1  # T


class Task(ABC):
    """A seeded, endless stream of problems over a set of items.

    `shuffle` draws a new order of the items each epoch. With `cycle`, problem p is problem p mod cycle:
    a fixed set that repeats.
    """

    times = Times()

    def __init__(self, *, seed: int, purpose: str, shuffle: bool = False, cycle: int = 0) -> None:
        self.seed, self.purpose, self.shuffle, self.cycle = seed, purpose, shuffle, cycle
        self._order: tuple[int, torch.Tensor] = (-1, torch.empty(0))  # (epoch, permutation)

    def number(self, p: int) -> int:
        """The number of problem p within the cycle, if there is one."""
        return p % self.cycle if self.cycle else p

    def item(self, p: int, count: int) -> int:
        """The item, 0..count-1, of problem p."""
        epoch, position = divmod(p, count)
        if not self.shuffle:
            return position
        if self._order[0] != epoch:
            generator = generator_for(self.seed, self.purpose + "/order", epoch)
            self._order = (epoch, torch.randperm(count, generator=generator))
        return int(self._order[1][position])

    @abstractmethod
    def batch(self, numbers: Sequence[int]) -> Batch:
        """The problems with these numbers, on the CPU."""

    def batches(self, number_lists: Sequence[Any], *, workers: int = 0) -> Iterator[Batch]:
        """One batch per list of numbers, in order; `workers` processes may read slow data."""
        return map(self.batch, number_lists)

    def fitting(self, size: int) -> int:
        """Problems at a time, `size` or as many as their answers fit into memory."""
        return size

    def sweep(self, count: int) -> Iterator[Batch]:
        """Problems 0..count-1 at each noise level in turn, cleanest first."""
        yield self.batch(range(count))

    def stream(self, count: int, *, size: int = 64) -> "Stream":
        """Problems 0..count-1 in batches that are drawn on access."""
        return Stream(self, count, size)


@dataclass(frozen=True)
class Stream(Sequence[Batch]):
    """Batches of problems 0..total-1, drawn on every access and not stored."""

    task: Task
    total: int
    size: int

    def __len__(self) -> int:
        return math.ceil(self.total / self.size)

    def __getitem__(self, k: Any) -> Any:
        if not 0 <= k < len(self):
            raise IndexError(k)
        return self.task.batch(range(k * self.size, min((k + 1) * self.size, self.total)))
