"""Swaps against enumeration: the cost of a swap, the search's result, the joint fit."""

from itertools import combinations, product

import pytest
import torch

from prunedm.masks import Pattern
from prunedm.removal import swaps
from prunedm.removal.nm import nm_mask
from prunedm.removal.swaps import refit, swap_search

ROWS, COLUMNS = 5, 8
PATTERNS = ["1:2", "1:4", "2:4", "3:4", "2:8", "4:8"]


def layer(seed: int = 0, columns: int = COLUMNS) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense weights (ROWS, K) and a correlated, well-conditioned H (K, K), in float64."""
    generator = torch.Generator().manual_seed(seed)
    dense_OK = torch.randn(ROWS, columns, generator=generator, dtype=torch.float64)
    x_PK = torch.randn(3 * columns, columns, generator=generator, dtype=torch.float64)
    x_PK = x_PK @ torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    h_KK = x_PK.T @ x_PK
    return dense_OK, h_KK + 0.05 * h_KK.diagonal().mean() * torch.eye(columns)


def error(dense_OK: torch.Tensor, w_OK: torch.Tensor, h_KK: torch.Tensor) -> torch.Tensor:
    difference_OK = dense_OK - w_OK
    return torch.einsum("ok,kl,ol->o", difference_OK, h_KK, difference_OK)


def fitted(dense_K: torch.Tensor, keep_K: torch.Tensor, h_KK: torch.Tensor) -> torch.Tensor:
    """The best weights on this mask, by a direct solution: H_SS w_S = (H dense)_S."""
    w_K = torch.zeros_like(dense_K)
    w_K[keep_K] = torch.linalg.solve(h_KK[keep_K][:, keep_K], (h_KK @ dense_K)[keep_K])
    return w_K


def fit(dense_OK: torch.Tensor, keep_OK: torch.Tensor, h_KK: torch.Tensor) -> torch.Tensor:
    pairs = zip(dense_OK, keep_OK, strict=True)
    return torch.stack([fitted(dense_K, keep_K, h_KK) for dense_K, keep_K in pairs])


def all_masks(pattern: Pattern, columns: int) -> list[torch.Tensor]:
    """Every N:M mask of one row."""
    groups = []
    for first in range(0, columns, pattern.m):
        members = range(first, first + pattern.m)
        groups.append(list(combinations(members, pattern.n)))
    masks = []
    for kept in product(*groups):
        mask_K = torch.zeros(columns, dtype=torch.bool)
        mask_K[[column for group in kept for column in group]] = True
        masks.append(mask_K)
    return masks


def random_start(pattern: Pattern, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """dense, fitted weights of a random mask, the mask, H."""
    dense_OK, h_KK = layer(seed)
    noise_OK = torch.rand(ROWS, COLUMNS, generator=torch.Generator().manual_seed(seed))
    keep_OK = nm_mask(noise_OK, pattern)
    return dense_OK, fit(dense_OK, keep_OK, h_KK), keep_OK, h_KK


@pytest.mark.parametrize("text", PATTERNS)
def test_refit_is_the_direct_solution_and_its_residual_is_true(text):
    dense_OK, _, keep_OK, h_KK = random_start(Pattern.parse(text))
    start_OK = dense_OK * keep_OK
    w_OK, residual_OK = refit(
        start_OK, (dense_OK - start_OK) @ h_KK, keep_OK, h_KK, steps=4 * COLUMNS
    )
    assert torch.allclose(w_OK, fit(dense_OK, keep_OK, h_KK), atol=1e-8)
    assert (w_OK[~keep_OK] == 0).all()
    assert torch.allclose(residual_OK, (dense_OK - w_OK) @ h_KK, atol=1e-7)


@pytest.mark.parametrize("text", PATTERNS)
def test_a_round_takes_the_swap_that_lowers_the_error_most(text):
    """By trying every swap of every group with the best value for the newcomer."""
    pattern = Pattern.parse(text)
    dense_OK, w_OK, keep_OK, h_KK = random_start(pattern)
    residual_OK = (dense_OK - w_OK) @ h_KK
    swapped_OK, new_OK = swaps._swap(
        w_OK, residual_OK, keep_OK, h_KK, pattern=pattern, share_O=torch.ones(ROWS)
    )
    before_O = error(dense_OK, w_OK, h_KK)
    swapped = 0
    for o, first in product(range(ROWS), range(0, COLUMNS, pattern.m)):
        members = range(first, first + pattern.m)
        best, best_w = 0.0, w_OK[o, members].tolist()
        for i, j in product(members, members):
            if keep_OK[o, i] and not keep_OK[o, j]:
                tried_K = w_OK[o].clone()
                tried_K[i] = 0
                tried_K[j] = ((dense_OK[o] - tried_K) @ h_KK)[j] / h_KK[j, j]
                change = float(error(dense_OK[o : o + 1], tried_K[None], h_KK) - before_O[o])
                if change < best:
                    best, best_w = change, tried_K[members].tolist()
        swapped += best < 0
        assert swapped_OK[o, members].tolist() == pytest.approx(best_w, abs=1e-9)
        assert torch.equal(new_OK[o, members], swapped_OK[o, members] != 0)
    assert swapped > 0


def test_a_round_changes_only_the_best_share_of_a_rows_groups():
    pattern = Pattern(1, 2)
    dense_OK, h_KK = layer(seed=3)
    keep_OK = nm_mask(-dense_OK.abs(), pattern)  # the worst start: every group gains by a swap
    w_OK = dense_OK * keep_OK
    residual_OK = (dense_OK - w_OK) @ h_KK

    def changed(share: float) -> torch.Tensor:
        _, new_OK = swaps._swap(
            w_OK, residual_OK, keep_OK, h_KK, pattern=pattern, share_O=torch.full((ROWS,), share)
        )
        return (new_OK != keep_OK).reshape(ROWS, -1, 2).any(2).sum(1)

    assert (changed(1.0) > 1).any()
    assert (changed(0.25) <= 1).all()
    assert torch.equal(changed(0.25), changed(1.0).clamp_max(1))


@pytest.mark.parametrize("text", PATTERNS)
@pytest.mark.parametrize("seed", range(3))
def test_the_search_keeps_n_of_m_and_no_row_gets_worse(text, seed):
    pattern = Pattern.parse(text)
    dense_OK, w_OK, keep_OK, h_KK = random_start(pattern, seed)
    found_OK, new_OK = swap_search(dense_OK, w_OK, keep_OK, h_KK, pattern, rounds=15)
    assert (new_OK.reshape(ROWS, -1, pattern.m).sum(2) == pattern.n).all()
    assert (found_OK[~new_OK] == 0).all()
    before_O, after_O = error(dense_OK, w_OK, h_KK), error(dense_OK, found_OK, h_KK)
    assert (after_O <= before_O + 1e-9).all()
    assert after_O.sum() < 0.9 * before_O.sum()


def test_the_search_comes_close_to_the_best_of_all_masks():
    """2:4 on 8 columns has 36 masks a row: each fitted exactly."""
    pattern, found, best, start = Pattern(2, 4), 0.0, 0.0, 0.0
    for seed in range(12):
        dense_OK, w_OK, keep_OK, h_KK = random_start(pattern, seed)
        _, new_OK = swap_search(dense_OK, w_OK, keep_OK, h_KK, pattern, rounds=15)
        start += float(error(dense_OK, w_OK, h_KK).sum())
        found += float(error(dense_OK, fit(dense_OK, new_OK, h_KK), h_KK).sum())
        tried = [
            error(dense_OK, fit(dense_OK, mask_K.expand(ROWS, -1), h_KK), h_KK)
            for mask_K in all_masks(pattern, COLUMNS)
        ]
        best += float(torch.stack(tried).amin(0).sum())
    assert best <= found < best + 0.25 * (start - best)


def test_with_independent_inputs_the_largest_weights_are_found():
    """H = identity: the best mask is by magnitude, and from there nothing moves."""
    pattern = Pattern(2, 4)
    dense_OK, _ = layer()
    identity_KK = torch.eye(COLUMNS, dtype=torch.float64)
    best_OK = nm_mask(dense_OK.abs(), pattern)
    worst_OK = nm_mask(-dense_OK.abs(), pattern)
    w_OK, keep_OK = swap_search(
        dense_OK, dense_OK * worst_OK, worst_OK, identity_KK, pattern, rounds=30
    )
    assert torch.equal(keep_OK, best_OK)
    assert torch.allclose(w_OK, dense_OK * best_OK)
    _, same_OK = swap_search(dense_OK, dense_OK * best_OK, best_OK, identity_KK, pattern, rounds=30)
    assert torch.equal(same_OK, best_OK)


def test_rows_are_searched_alike_in_any_chunk(monkeypatch):
    pattern = Pattern(2, 4)
    whole = swap_search(*random_start(pattern), pattern, rounds=10)
    monkeypatch.setattr(swaps, "_CHUNK", 2 * COLUMNS * pattern.m)
    parts = swap_search(*random_start(pattern), pattern, rounds=10)
    assert torch.equal(whole[1], parts[1])
    assert torch.allclose(whole[0], parts[0], atol=1e-9)


def test_no_rounds_change_nothing():
    dense_OK, w_OK, keep_OK, h_KK = random_start(Pattern(2, 4))
    found_OK, new_OK = swap_search(dense_OK, w_OK, keep_OK, h_KK, Pattern(2, 4), rounds=0)
    assert torch.equal(found_OK, w_OK)
    assert torch.equal(new_OK, keep_OK)
