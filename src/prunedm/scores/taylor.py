"""First-order Taylor (Molchanov et al. 2019, "Importance estimation for neural network pruning").

Removing weights w changes the loss by about -sum w * dL/dw. The two reductions over the weights of a
channel differ: |sum w g| lets their effects cancel, sum |w g| does not. For single weights they agree.
"""

import torch

from prunedm.scores.score import Score


def taylor(weight: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """|w * dL/dw|, so that a channel's is the sum of the sizes of its weights' effects."""
    return (weight * gradient).abs()


def taylor_multivariable(weight: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """w * dL/dw, signed: what goes together is summed first, and its absolute value compared."""
    return weight * gradient


TAYLOR = Score(taylor, "gradient")
TAYLOR_MULTIVARIABLE = Score(taylor_multivariable, "gradient")
