"""How a network is asked: keyword tensors go in, one tensor comes out."""

from collections.abc import Mapping

import torch
from torch import nn
from torch.func import functional_call

Inputs = Mapping[str, torch.Tensor]  # a network's keyword arguments, N rows each


def answer(
    network: nn.Module, inputs: Inputs, *, weights: Mapping[str, torch.Tensor] | None = None
) -> torch.Tensor:
    """The network's answer to `inputs`: the only call of a network in the package.

    `weights`: tensors in the place of the parameters of these names.
    """
    told = dict(inputs) | {"return_dict": False}
    if weights is None:
        answered: torch.Tensor = network(**told)[0]
    else:
        answered = functional_call(network, dict(weights), (), told)[0]
    return answered


def like_weights(network: nn.Module, inputs: Inputs) -> dict[str, torch.Tensor]:
    """`inputs` where the network's weights are; floating ones but times in the weights' type."""
    weight = next(network.parameters())
    return {
        name: tensor.to(weight.device, weight.dtype if _is_content(name, tensor) else tensor.dtype)
        for name, tensor in inputs.items()
    }


def _is_content(name: str, tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() and name != "timestep"  # half types would round it
