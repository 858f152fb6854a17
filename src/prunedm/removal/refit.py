"""Fitting the kept weights of a layer together: conjugate gradients on all rows at once.

Letters: O output channels; K columns, ordered (kh, kw, I).
"""

import torch


def refit(
    w_OK: torch.Tensor,
    residual_OK: torch.Tensor,
    keep_OK: torch.Tensor,
    h_KK: torch.Tensor,
    *,
    steps: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Minimise tr((W - dense) H (W - dense)^T) over the kept weights, starting at `w_OK`.

    `residual_OK` is (dense - w) H; returns both for the new weights. Preconditioned by the diagonal
    of H. Each step needs one product with H for all rows, where a direct solution would need a
    factorisation per row.
    """
    tiny = torch.finfo(w_OK.dtype).tiny
    inverse_K = keep_OK / h_KK.diagonal()  # preconditioner and mask in one
    scaled_OK = residual_OK * inverse_K
    direction_OK, size_O = scaled_OK, (residual_OK * scaled_OK).sum(1)
    for _ in range(steps):
        image_OK = direction_OK @ h_KK
        step_O = size_O / (direction_OK * image_OK).sum(1).clamp_min(tiny)
        w_OK = w_OK + step_O[:, None] * direction_OK
        residual_OK = residual_OK - step_O[:, None] * image_OK
        scaled_OK = residual_OK * inverse_K
        last_O, size_O = size_O, (residual_OK * scaled_OK).sum(1)
        direction_OK = scaled_OK + (size_O / last_O.clamp_min(tiny))[:, None] * direction_OK
    return w_OK, residual_OK
