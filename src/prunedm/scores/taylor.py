"""First-order Taylor (Molchanov et al. 2019, "Importance estimation for neural network pruning").

Removing weights w changes the loss by about -sum w * dL/dw. The two reductions over the weights of a
channel differ: |sum w g| lets their effects cancel, sum |w g| does not. For single weights they agree.

Diff-Pruning (Fang et al. 2023, "Structural pruning for diffusion models", arXiv:2305.10924) takes the
gradients over t = 0, 1, 2, ... on one fixed batch and noise, up to the first timestep whose loss is
below a share of the largest so far (eq. 6: L_t / L_max > T). Later, noisier steps have small losses
and gradients that only blur the score.
"""

import torch

from prunedm.scores.score import Score


def taylor(weight: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """|w * dL/dw|: a channel's score is the sum of the sizes of its weights' effects."""
    return (weight * gradient).abs()


def taylor_multivariable(weight: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """w * dL/dw, signed: the effects of a channel's weights are summed before their size counts."""
    return weight * gradient


TAYLOR = Score(taylor, "gradient")
TAYLOR_MULTIVARIABLE = Score(taylor_multivariable, "gradient")
DIFF_PRUNING = Score(taylor, "low-noise gradient")
