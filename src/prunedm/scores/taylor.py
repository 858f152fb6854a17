"""First-order Taylor (Molchanov et al. 2019, "Importance estimation for neural network pruning")."""

import torch


def taylor(weight: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """|w * dL/dw|, the change of the loss when w goes to zero, to first order."""
    return (weight * gradient).abs()
