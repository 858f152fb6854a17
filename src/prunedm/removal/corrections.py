"""What a layer has to make good: the error that pruning has left before it.

A pruned network gives a layer other inputs x than the dense one. Its output is to be the dense one's
all the same (GPTAQ, Li et al. 2025, arXiv:2504.02692; QEP, Arai & Ichikawa 2025, arXiv:2504.09629),
and where the output is added to something, as to a residual stream, the sum is: it then makes good
what the stream has lost as well. With s and s' the results in the pruned and in the dense network,

    min over V of sum_p |s_p + (V - W) x_p - s'_p|^2   =>   V = W + (S' - S)^T X H^-1,   H = X^T X,

so that V takes the place of the dense weight in every quadratic of H.

Letters: O output channels; K columns of a layer's weight; P positions; N problems.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from prunedm.architecture import device_of
from prunedm.networks.layer_kinds import kind_of, patches, weight_of
from prunedm.networks.layers import hooked
from prunedm.progress import Bar
from prunedm.removal.input_grams import Weigh, scaled
from prunedm.task import Batch, predict

_ADDING = {"add", "add_", "__add__", "__iadd__", "__radd__"}


@dataclass(frozen=True)
class Dense:
    """The network as it was, and its own batches of the same problems, in the same order."""

    network: nn.Module
    batches: Iterable[Batch]


class Results(TorchFunctionMode):
    """Within the context, by layer: its input, and the sum that its output goes into or the output.

    added: the layers whose output goes into a sum with a tensor of its shape that was there before, as
    a residual stream is; x + x^3 inside an activation is not such a sum.
    """

    def __init__(self) -> None:
        super().__init__()
        self.inputs: dict[str, torch.Tensor] = {}
        self.results: dict[str, torch.Tensor] = {}
        self.added: set[str] = set()
        # by id, kept so that each is of one tensor: layer, output, calls of functions before it
        self._outputs: dict[int, tuple[str, torch.Tensor, int]] = {}
        self._calls = 0
        self._made: dict[int, int] = {}  # id of a tensor => the call that made it

    def hear(self, name: str, _: nn.Module, inputs: tuple[torch.Tensor, ...], output: Any) -> None:
        self.inputs[name], self.results[name] = inputs[0], output
        self._outputs[id(output)] = name, output, self._calls

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") in _ADDING:
            for term, other in (args[:2], args[1::-1]):
                name, _, calls = self._outputs.get(id(term), ("", None, 0))
                before = name and self._made.get(id(other), 0) <= calls
                if before and torch.is_tensor(other) and other.shape == term.shape:
                    self.results[name] = made
                    self.added.add(name)
        self._calls += 1
        self._made[id(made)] = self._calls
        return made


@torch.no_grad()
def results(network: nn.Module, layers: Mapping[str, nn.Module], batch: Batch) -> Results:
    """Of one pass over the problems, at these layers, in the order of their calls."""
    found = Results()
    with hooked(layers, found.hear), found:
        predict(network, batch.to(device_of(network)))
    return found


@torch.no_grad()
def corrections(
    network: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Iterable[Batch],
    dense: Dense,
    *,
    weigh: Weigh,
    bar: Bar | None = None,
) -> dict[str, torch.Tensor]:
    """(S' - S)^T X of each layer, problems weighted by `weigh`: (O, K), as `input_grams`.

    Layers before others in these are to be as they will stay. A layer with other positions than in
    the dense network, as experts have, is left out.
    """
    found: dict[str, torch.Tensor] = {}
    whole = {name: dense.network.get_submodule(name) for name in layers}
    for batch, beside in zip(batches, dense.batches, strict=True):
        own, due = results(network, layers, batch), results(dense.network, whole, beside)
        root_N = weigh(batch.level_N).to(device_of(network)).sqrt()
        for name, layer in layers.items():
            if own.results[name].shape != due.results[name].shape:
                continue
            x = scaled(own.inputs[name], root_N)
            error = scaled(due.results[name] - own.results[name], root_N)
            error_PO = error.movedim(kind_of(layer).channel_axis, -1).flatten(0, -2)
            weight = weight_of(layer)
            total_OK = found.setdefault(name, x.new_zeros(len(weight), weight[0].numel()))
            start = 0
            for x_PK in patches(layer, x):
                total_OK.addmm_(error_PO[start : start + len(x_PK)].T, x_PK)
                start += len(x_PK)
        if bar is not None:
            bar.advance()
    return found
