"""Evaluating a network to the same bits whether or not it is being trained."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Within the context: no dropout, and no weight requires gradients; afterwards as before.

    With a weight that requires gradients, PyTorch multiplies by another kernel even under `no_grad`
    (at::matmul folds its batch), with other last bits on CPUs without AVX-512.
    """
    modes = [(module, module.training) for module in network.modules()]
    wanting = [parameter for parameter in network.parameters() if parameter.requires_grad]
    network.eval()
    for parameter in wanting:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanting:
            parameter.requires_grad_(True)
        for module, mode in modes:
            module.training = mode
