"""A network's blocks in turn, each as a network of its own whose problems are its kept inputs.

The protocol of SparseGPT and Wanda: a block is calibrated on what the pruned blocks before it make of
the problems. Every block runs twice a problem, however many there are, in place of the whole network
once for each set of layers.

Shapes: S problems, L positions, D channels.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from copy import deepcopy
from typing import Any

import torch
from torch import nn

from prunedm.architecture import architecture_of, device_of, unwrapped
from prunedm.networks.layers import Named, hooked_before
from prunedm.task import Batch, Task, predict

Told = dict[int, tuple[tuple[Any, ...], dict[str, Any]]]  # by the number of problems in a batch


class BlockNetwork(nn.Module):
    """One block as a network: `sample` (N, L, D) => what the block makes of it.

    told: its further arguments (positions, attention masks), for batches of so many problems.
    """

    def __init__(self, block: nn.Module, told: Told) -> None:
        super().__init__()
        self.block, self.told = block, told

    def forward(self, sample: torch.Tensor, *, return_dict: bool = False) -> tuple[torch.Tensor]:
        others, named = self.told[len(sample)]
        return (hidden_of(self.block(sample, *others, **named)),)


def hidden_of(made: Any) -> torch.Tensor:
    """The hidden states in what a block returns: caches and attention weights may stand behind."""
    hidden: torch.Tensor = made[0] if isinstance(made, tuple | list) else made
    return hidden


class KeptInputs(Task):
    """What a block is given on problems 0 to S - 1: hidden_SLD, which waits on the CPU.

    size: problems at a time, for which the block's further arguments are known.
    """

    def __init__(self, hidden_SLD: torch.Tensor, size: int) -> None:
        self.hidden_SLD, self.size = hidden_SLD, size

    def fitting(self, size: int) -> int:
        """Always the same number: the block takes no other."""
        return self.size

    def batch(self, numbers: Sequence[int]) -> Batch:
        """Rows of the hidden states; nothing is asked of them, so they are the target too."""
        hidden = self.hidden_SLD[list(numbers)]
        return Batch({"sample": hidden}, hidden, numbers=tuple(numbers))

    @torch.no_grad()
    def after(self, block: BlockNetwork) -> "KeptInputs":
        """What the next block is given, where this one is given these."""
        device = device_of(block)
        stream = self.stream(len(self.hidden_SLD), size=self.size)
        made = [predict(block, batch.to(device)).cpu() for batch in stream]
        return KeptInputs(torch.cat(made), self.size)


def chained_blocks(network: nn.Module) -> dict[str, nn.Module]:
    """The blocks by name, in order, where each is given what the one before it made; else {}."""
    record = architecture_of(network)
    return {
        name: module
        for name, module in unwrapped(network).named_modules()
        if record.chained and any(re.fullmatch(pattern, name) for pattern in record.blocks)
    }


def with_dense(
    turns: Iterable[tuple[str, BlockNetwork, KeptInputs]],
) -> Iterator[tuple[str, BlockNetwork, KeptInputs, tuple[BlockNetwork, KeptInputs]]]:
    """Beside each block of `blocks_in_turn`: a copy as it was, and the inputs that such copies make.

    A second copy of the inputs waits on the CPU, and one block is copied at a time.
    """
    before: tuple[BlockNetwork, KeptInputs] | None = None
    for name, block, inputs in turns:
        whole = before[1].after(before[0]) if before else inputs
        before = BlockNetwork(deepcopy(block.block), block.told), whole
        yield name, block, inputs, before


class _Enough(Exception):
    """The last block was reached."""


@torch.no_grad()
def blocks_in_turn(
    network: nn.Module, problems: Task, count: int, *, size: int
) -> Iterator[tuple[str, BlockNetwork, KeptInputs]]:
    """Each block by name, as a network, with its inputs on problems 0 to count - 1.

    What the caller does to a block, the blocks after it see. size: problems at a time. A pass of the
    network comes first: it gives the first block's inputs and every block's further arguments.
    """
    blocks, device, size = chained_blocks(network), device_of(network), problems.fitting(size)
    told: dict[str, Told] = {name: {} for name in blocks}
    (first, *_), (*_, last), hidden = blocks, blocks, list[torch.Tensor]()

    def hear(name: str, _: nn.Module, args: tuple[Any, ...], named: Named) -> None:
        told[name][len(args[0])] = args[1:], named
        if name == first:
            hidden.append(args[0].cpu())
        if name == last:
            raise _Enough

    network.eval()
    with hooked_before(blocks, hear):
        for batch in problems.stream(count, size=size):
            with suppress(_Enough):  # the head and its logits are not wanted
                predict(network, batch.to(device))
    inputs = KeptInputs(torch.cat(hidden), size)
    for name, block in blocks.items():
        alone = BlockNetwork(block, told.pop(name))
        yield name, alone, inputs
        if told:  # there is a block after it
            inputs = inputs.after(alone)
