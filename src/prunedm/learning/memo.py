"""Cache of values per problem: dense outputs, losses of the first masks."""

from collections.abc import Callable

import torch

from prunedm.task import Batch


class Memo:
    """Rows by problem number, as many as fit into `memory` bytes; others are computed again."""

    def __init__(self, memory: int) -> None:
        self.free = memory
        self._rows: dict[int, torch.Tensor] = {}

    @torch.no_grad()
    def __call__(self, batch: Batch, compute: Callable[[Batch], torch.Tensor]) -> torch.Tensor:
        """`compute(batch)`, shape (N, ...), from memory where all rows are known."""
        if batch.numbers and all(number in self._rows for number in batch.numbers):
            return torch.stack([self._rows[number] for number in batch.numbers])
        values = compute(batch).detach()
        for number, row in zip(batch.numbers, values, strict=False):
            if number not in self._rows and row.nbytes <= self.free:
                self.free -= row.nbytes
                self._rows[number] = row.clone()  # a view would keep the whole batch
        return values
