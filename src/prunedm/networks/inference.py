"""A network as it is evaluated: the same bits whatever was being trained."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Without dropout, and no weight wants gradients; afterwards the network is as it was.

    Where one does, PyTorch multiplies by another kernel, even under `no_grad` (at::matmul folds its
    batch), whose last bits differ on CPUs without AVX-512.
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
