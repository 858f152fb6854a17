"""What a network is asked, and what the answer should have been: the one currency of every method."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from prunedm.architecture import Inputs


@dataclass(frozen=True)
class Batch:
    """N problems: what the network is told, and what it should answer (N, ...).

    `numbers`: which problems of their stream these are.
    """

    inputs: Inputs
    target: torch.Tensor
    numbers: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.target)

    def to(self, device: torch.device | str) -> "Batch":
        inputs = {name: tensor.to(device) for name, tensor in self.inputs.items()}
        return Batch(inputs, self.target.to(device), self.numbers)

    def rows(self, rows: Sequence[int]) -> "Batch":
        """These problems of the batch, in this order."""
        inputs = {name: tensor[rows] for name, tensor in self.inputs.items()}
        numbers = tuple(self.numbers[row] for row in rows) if self.numbers else ()
        return Batch(inputs, self.target[rows], numbers)

    def cat(self, other: "Batch") -> "Batch":
        """These problems, and the others behind them."""
        inputs = {name: torch.cat([x, other.inputs[name]]) for name, x in self.inputs.items()}
        return Batch(
            inputs, torch.cat([self.target, other.target]), (*self.numbers, *other.numbers)
        )
