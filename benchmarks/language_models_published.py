"""The published code of Wanda and SparseGPT on a Llama, block after block as both papers do.

Their repositories (github.com/locuslab/wanda, github.com/IST-DASLab/sparsegpt) are read from a folder;
what they compute for a layer is theirs. What runs the blocks is written here, since theirs is for
releases of transformers whose layers take other arguments.

Letters: O output channels, I input channels; M weights of a group.
"""

import importlib
import io
import sys
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from prunedm.folder import Model
from prunedm.options import PruneOptions
from prunedm.stages.inputs import calibration_problems, data_for

N, M = 2, 4
Prune = Callable[[nn.Linear, Any], None]  # a layer and its wrapper, which has seen its inputs


class _Caught(Exception):
    """The first block was reached."""


@torch.no_grad()
def prune_as_published(
    model: Model, options: PruneOptions, repository: Path
) -> dict[str, torch.Tensor]:
    """Prune to 2:4 in place by the code in `repository`: masks by layer, True where kept."""
    place, module, name, prune = PUBLISHED[repository.name]
    with patch.object(sys, "path", [str(repository / place), *sys.path]):
        wrapper = getattr(importlib.import_module(module), name)
    network, masks = model.denoiser.eval(), dict[str, torch.Tensor]()
    problems = calibration_problems(model, options, data_for(model, options, "train"))
    hidden: list[torch.Tensor] = []
    named: dict[str, Any] = {}

    def catch(_: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        hidden.append(args[0])
        named.update(given)
        raise _Caught

    handle = network.model.layers[0].register_forward_pre_hook(catch, with_kwargs=True)
    for number in range(options.calibration_problems):
        with suppress(_Caught):
            network(**problems.batch([number]).inputs, use_cache=False)
    handle.remove()
    for index, block in enumerate(network.model.layers):
        layers = {n: layer for n, layer in block.named_modules() if isinstance(layer, nn.Linear)}
        wrapped = {n: wrapper(layer) for n, layer in layers.items()}

        def hear(n: str, wrapped: dict[str, Any] = wrapped) -> Callable[..., None]:
            return lambda _, args, output: wrapped[n].add_batch(args[0], output)

        handles = [layer.register_forward_hook(hear(n)) for n, layer in layers.items()]
        for sample in hidden:
            block(sample, **named)
        for handle in handles:
            handle.remove()
        for n, layer in layers.items():
            prune(layer, wrapped[n])
            masks[f"model.layers.{index}.{n}"] = layer.weight != 0
        hidden = [block(sample, **named) for sample in hidden]
    return masks


def _by_wanda(layer: nn.Linear, wrapped: Any) -> None:
    """The lowest of |w| times the norm of its input, in every group."""
    score_OI = layer.weight.abs() * wrapped.scaler_row.sqrt()
    lowest_OGN = score_OI.unflatten(1, (-1, M)).topk(M - N, dim=2, largest=False).indices
    gone_OGM = torch.zeros_like(score_OI).unflatten(1, (-1, M)).scatter(2, lowest_OGN, 1.0)
    layer.weight.masked_fill_(gone_OGM.flatten(1).bool(), 0)


def _by_sparsegpt(_: nn.Linear, wrapped: Any) -> None:
    # it waits for a GPU, and prints
    with patch.object(torch.cuda, "synchronize"), redirect_stdout(io.StringIO()):
        wrapped.fasterprune(0, M - N, M)


# by the repository's name: folder and module of the code, its class, and how a layer is pruned by it
PUBLISHED: dict[str, tuple[str, str, str, Prune]] = {
    "wanda": ("lib", "layerwrapper", "WrappedGPT", _by_wanda),
    "sparsegpt": ("", "sparsegpt", "SparseGPT", _by_sparsegpt),
}
