"""Better N:M masks on a layer's quadratic: swaps inside groups, with the kept weights refitted.

A sweep decides each group once, before it knows how later columns will compensate. Starting from its
mask, a round exchanges in some groups of every row a kept weight i for a removed one j,

    cost = w_i^2 H_ii - (r_j + w_i H_ij)^2 / H_jj,    r = (dense - w) H,

which is the change of E(w) = (w - dense) H (w - dense)^T when the other weights are fixed and w_j is
optimal. Then the kept weights are refitted. A row keeps its new mask where E has decreased.

`refit` fits the kept weights of a layer together; OBS ends with it too.

Letters: O rows; K columns, ordered (*taps, I); G groups of M in a row; i, j members of a group.
"""

import torch

from prunedm.masks import Pattern

REFIT_STEPS = 3  # after each round; the last fit is the caller's
FIRST_SHARE = 0.25  # of a row's groups changed per round; halved where a row did not improve
_CHUNK = 1 << 24  # numbers in the table of swaps at a time


def swap_search(
    dense_OK: torch.Tensor,
    w_OK: torch.Tensor,
    keep_OK: torch.Tensor,
    h_KK: torch.Tensor,
    pattern: Pattern,
    *,
    rounds: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and masks with no row's E increased and exactly N kept in every group."""
    rows = max(1, _CHUNK // (w_OK.shape[1] * pattern.m))
    parts = [
        _search(*part, h_KK, pattern=pattern, rounds=rounds)
        for part in zip(dense_OK.split(rows), w_OK.split(rows), keep_OK.split(rows), strict=True)
    ]
    return torch.cat([w for w, _ in parts]), torch.cat([keep for _, keep in parts])


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


def _search(
    dense_OK: torch.Tensor,
    w_OK: torch.Tensor,
    keep_OK: torch.Tensor,
    h_KK: torch.Tensor,
    *,
    pattern: Pattern,
    rounds: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    residual_OK = (dense_OK - w_OK) @ h_KK
    error_O = _error(dense_OK, w_OK, residual_OK)
    share_O = torch.full_like(error_O, FIRST_SHARE)
    for _ in range(rounds):
        swapped_OK, new_OK = _swap(
            w_OK, residual_OK, keep_OK, h_KK, pattern=pattern, share_O=share_O
        )
        if torch.equal(new_OK, keep_OK):
            break
        start_OK = residual_OK + (w_OK - swapped_OK) @ h_KK
        fitted_OK, left_OK = refit(swapped_OK, start_OK, new_OK, h_KK, steps=REFIT_STEPS)
        now_O = _error(dense_OK, fitted_OK, left_OK)
        moved_O = (new_OK != keep_OK).any(1)  # else a row would depend on the others
        better_O = moved_O & (now_O < error_O)
        w_OK = torch.where(better_O[:, None], fitted_OK, w_OK)
        keep_OK = torch.where(better_O[:, None], new_OK, keep_OK)
        residual_OK = torch.where(better_O[:, None], left_OK, residual_OK)
        error_O = torch.where(better_O, now_O, error_O)
        share_O = torch.where(better_O, share_O, share_O / 2)
    return w_OK, keep_OK


def _error(dense_OK: torch.Tensor, w_OK: torch.Tensor, residual_OK: torch.Tensor) -> torch.Tensor:
    """E of each row: (dense - w) H (dense - w)^T."""
    return ((dense_OK - w_OK) * residual_OK).sum(1)


def _swap(
    w_OK: torch.Tensor,
    residual_OK: torch.Tensor,
    keep_OK: torch.Tensor,
    h_KK: torch.Tensor,
    *,
    pattern: Pattern,
    share_O: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Apply the best swap of the groups that gain most, at most this share of each row's groups."""
    rows, columns, m = *w_OK.shape, pattern.m
    groups = columns // m
    h_GMM = h_KK.reshape(groups, m, groups, m).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    h_GM = h_GMM.diagonal(dim1=1, dim2=2)
    w_OGM, r_OGM = w_OK.reshape(rows, groups, m), residual_OK.reshape(rows, groups, m)
    keep_OGM = keep_OK.reshape(rows, groups, m)
    pull_OGij = r_OGM[:, :, None, :] + w_OGM[..., None] * h_GMM  # pulls w_j away from zero
    cost_OGij = (w_OGM.square() * h_GM)[..., None] - pull_OGij.square() / h_GM[:, None, :]
    allowed_OGij = keep_OGM[..., None] & ~keep_OGM[:, :, None, :]
    cost_OG, best_OG = cost_OGij.masked_fill(~allowed_OGij, torch.inf).flatten(2).min(2)
    rank_OG = cost_OG.argsort(dim=1, stable=True).argsort(1)
    chosen_OG = (cost_OG < 0) & (rank_OG < (share_O * groups).ceil()[:, None])
    o, g = chosen_OG.nonzero(as_tuple=True)
    i, j = best_OG[o, g] // m, best_OG[o, g] % m
    swapped_OGM, new_OGM = w_OGM.clone(), keep_OGM.clone()
    swapped_OGM[o, g, j] = pull_OGij[o, g, i, j] / h_GM[g, j]
    swapped_OGM[o, g, i] = 0
    new_OGM[o, g, j], new_OGM[o, g, i] = True, False
    return swapped_OGM.reshape(rows, columns), new_OGM.reshape(rows, columns)
