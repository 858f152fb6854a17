"""Checks that an exported file has kept the zeros of N:M masks.

Exporters fold constants, transpose weights and rename them, and an optimizer may rewrite them; so the
weights are looked for among the arrays that a runtime will read from the file.
"""

from collections.abc import Iterable

import numpy as np
import torch

from prunedm.errors import UserError
from prunedm.masks import Masks


def check_zeros(arrays: Iterable[tuple[str, np.ndarray]], masks: Masks, where: str) -> int:
    """The number of layers whose zeros were found in the file, which is that of all masked layers.

    `arrays`: the file's, by name. A layer's weight is an array of its shape (transposed for linear
    layers) with zeros wherever the mask has them, preferably one of its name. Each array is used once.
    Raises `UserError` naming the first layer whose zeros or pattern are not found.
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
            # several may fit by chance or because of many zeros; the one with most non-zeros is meant
            count = int((weight != 0).sum()) + own * kept.size
            if count > most:
                best, most = (number, weight), count
    return best
