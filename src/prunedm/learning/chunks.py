"""A function of independent groups in bounded memory, its gradient too."""

from collections.abc import Callable
from functools import partial

import torch
from torch.utils.checkpoint import checkpoint

GRAPH_CHUNK = 1 << 21  # numbers at a time that a graph holds: 8 MB in float32


def in_chunks(
    function: Callable[..., torch.Tensor], cost: int, *tensors: torch.Tensor
) -> torch.Tensor:
    """function(*tensors), group by group alike, where one group's graph holds `cost` numbers."""
    groups = max(1, GRAPH_CHUNK // cost)
    run = function
    if torch.is_grad_enabled() and tensors[0].requires_grad and len(tensors[0]) > groups:
        # the graph of a chunk is dropped, and made again when its gradient is taken
        run = partial(checkpoint, function, use_reentrant=False, preserve_rng_state=False)
    parts = zip(*(tensor.split(groups) for tensor in tensors), strict=True)
    return torch.cat([run(*part) for part in parts])
