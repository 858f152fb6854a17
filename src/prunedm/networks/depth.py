"""Whole blocks removed from a chain of blocks, and how much each one does.

The blocks that stay are numbered anew, and the config says how many there are: the network is then one
of its own class, which any version of transformers loads.

Shapes: N problems, L positions, D channels.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from prunedm.architecture import device_of
from prunedm.errors import UserError
from prunedm.networks.chain import chained_blocks, hidden_of
from prunedm.networks.layers import hooked, replace_module
from prunedm.networks.narrowed import as_narrowed
from prunedm.task import Batch, predict


@torch.no_grad()
def block_influence(network: nn.Module, batches: Iterable[Batch]) -> dict[str, float]:
    """1 - cos(what a block is given, what it makes), by block: the mean over positions.

    Block influence (Men et al. 2024, "ShortGPT", arXiv:2403.03853), of all blocks in one pass.
    """
    total: dict[str, float] = {}
    count = 0

    def hear(name: str, _: nn.Module, args: tuple[Any, ...], made: Any) -> None:
        given_NLD, made_NLD = args[0].float(), hidden_of(made).float()
        cosine_NL = torch.cosine_similarity(given_NLD, made_NLD, dim=-1)
        total[name] = total.get(name, 0.0) + float((1 - cosine_NL.mean(1)).sum())

    with hooked(chained_blocks(network), hear):
        for batch in batches:
            predict(network, batch.to(device_of(network)))
            count += len(batch.target)
    return {name: value / count for name, value in total.items()}


def remove_blocks(network: Any, names: Iterable[str]) -> Any:
    """The network without these blocks of its chain, changed in place.

    Raises `UserError` where the config cannot say what is left.
    """
    blocks, gone = chained_blocks(network), set(names)
    places = [place for place, name in enumerate(blocks) if name not in gone]
    kept = [block for name, block in blocks.items() if name not in gone]
    for old, (new, block) in zip(places, enumerate(kept), strict=True):
        _renumber(block, old, new)
    replace_module(network, next(iter(blocks)).rpartition(".")[0], nn.ModuleList(kept))
    config = network.config
    for name, value in config.to_dict().items():
        if isinstance(value, list | tuple) and len(value) == len(blocks):
            setattr(config, name, [value[k] for k in places])
    try:
        config.num_hidden_layers = len(kept)
        return as_narrowed(network)
    except Exception as error:  # validators of transformers raise many types
        raise UserError(
            f"depth: a {type(network).__name__} of other blocks is not one that its config can say: "
            f"{' '.join(str(error).split())}"
        ) from error


def _renumber(block: nn.Module, old: int, new: int) -> None:
    """Change the block's number where its modules repeat it (caches go by it)."""
    for module in block.modules():
        for name, value in vars(module).items():
            if "layer" in name and type(value) is int and value == old:
                setattr(module, name, new)
