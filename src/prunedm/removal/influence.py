"""How far each position of a layer's output moves the model's output.

A layer's error does not matter alike everywhere: the end loss hears some pixels and timesteps of it
more than others. With random signs v and g = J_z^T v, where J_z are the derivatives of the model's
output by the layer's output z, the mean of g^2 over the signs is the diagonal of J_z^T J_z, which is
the Gauss-Newton Hessian of a squared loss (Hutchinson 1990; as weights of a layer's quadratic:
GuidedQuant, Kim et al. 2025, arXiv:2505.07004).

Letters: N problems; P positions (pixels or tokens of all problems).
"""

from collections.abc import Sequence

import torch
from torch import nn

from prunedm.networks.layer_kinds import kind_of
from prunedm.randomness import generator_for
from prunedm.task import Batch

FLOOR = 1e-30  # of g^2: where no position is heard, all count alike


def random_signs(batch: Batch, first: int, output_NCHW: torch.Tensor) -> torch.Tensor:
    """+1 or -1, of the shape of the network's output; a function of each problem's number alone.

    `first`: number of the first problem where the batch does not say.
    """
    numbers = batch.numbers or range(first, first + len(batch))
    bits = [
        torch.randint(0, 2, output_NCHW.shape[1:], generator=generator_for(0, "signs", number))
        for number in numbers
    ]
    return (2 * torch.stack(bits) - 1).to(output_NCHW)


def influence(
    output_NCHW: torch.Tensor,
    signs_NCHW: torch.Tensor,
    layers: Sequence[nn.Module],
    outputs: Sequence[torch.Tensor],
) -> list[torch.Tensor]:
    """One draw of g^2, summed over the channels, at each position of these layers' outputs: (P,).

    Positions are in the order of `layer_kinds.patches`.
    """
    along = (output_NCHW.float() * signs_NCHW.float()).sum()
    gradients = torch.autograd.grad(along, list(outputs), allow_unused=True)
    found = []
    for layer, output, gradient in zip(layers, outputs, gradients, strict=True):
        g = torch.zeros_like(output) if gradient is None else gradient
        g = g if g.dtype == torch.float64 else g.float()
        found.append(g.square().sum(kind_of(layer).channel_axis).flatten().clamp_min(FLOOR))
    return found
