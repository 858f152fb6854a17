"""Whether the zeros of N:M masks are still there in an exported file.

Exporters fold constants, transpose weights and rename them, and an optimiser may rewrite them; so
the weights are looked for among the arrays that the file holds, as it will be read by a runtime.
"""

from collections.abc import Iterable

import numpy as np
import torch

from prunedm.errors import UserError
from prunedm.masks import Masks


def check_zeros(arrays: Iterable[tuple[str, np.ndarray]], masks: Masks, where: str) -> int:
    """How many layers' zeros were found in the file: all that have masks, else `UserError`.

    `arrays`: all that the file holds, by name. A layer's weight is the array that has its name, or
    its shape (transposed for linear layers) and zeros wherever the mask has them. Arrays are used
    once. Raises `UserError` naming the first layer whose zeros are not found, or not its pattern.
    """
    free = [(name, array) for name, array in arrays if array.ndim >= 2]
    for layer, mask in masks:
        kept = mask.numpy()
        found = _weight(free, layer, kept)
        if found is None:
            raise UserError(
                f"{where} has lost the zeros of {layer}: no weight of shape {kept.shape} in it is "
                "zero where the mask is; report this with the versions in record.json"
            )
        number, weight = found
        del free[number]
        pattern = masks.patterns.get(layer)
        kept_there = torch.from_numpy(np.ascontiguousarray(weight != 0))
        if pattern is not None and not bool(pattern.valid_in(kept_there).all()):
            raise UserError(f"{where}: the weight of {layer} is not {pattern} in the file")
    return len(masks.by_layer)


def _weight(
    free: list[tuple[str, np.ndarray]], layer: str, kept: np.ndarray
) -> tuple[int, np.ndarray] | None:
    """The array of this layer in [O, I, ...], and its place in the list."""
    best: tuple[int, np.ndarray] | None = None
    most = -1
    for number, (name, array) in enumerate(free):
        own = f"{layer}.weight" in name
        for weight in (array, array.T) if array.ndim == 2 else (array,):
            if weight.shape != kept.shape or bool((weight[~kept] != 0).any()):
                continue
            # several layers of one shape may fit by chance or by many zeros; the fullest is meant
            count = int((weight != 0).sum()) + own * kept.size
            if count > most:
                best, most = (number, weight), count
    return best
