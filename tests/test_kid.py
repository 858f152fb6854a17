"""Kernel distance: a double loop, torch-fidelity, the spread over new images."""

import numpy as np
import pytest
import torch

from prunedm.errors import UserError
from prunedm.evaluation.kid import kernel_distance, kernel_unit, squared_discrepancy


def features(seed: int, count: int, dim: int = 6, shift: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, dim)) + shift


def by_loops(x_MD: np.ndarray, y_MD: np.ndarray) -> float:
    def kernel(a_D: np.ndarray, b_D: np.ndarray) -> float:
        return (sum(a * b for a, b in zip(a_D, b_D, strict=True)) / len(a_D) + 1) ** 3

    size = len(x_MD)
    total = 0.0
    for i in range(size):
        for j in range(size):
            if i != j:
                total += kernel(x_MD[i], x_MD[j]) / (size * (size - 1))
                total += kernel(y_MD[i], y_MD[j]) / (size * (size - 1))
            total -= 2 * kernel(x_MD[i], y_MD[j]) / size**2
    return total


def test_is_the_unbiased_discrepancy_under_the_cubic_kernel() -> None:
    x, y = features(0, 11), features(1, 11, shift=0.4)
    expected = by_loops(x, y)
    assert squared_discrepancy(x, y) == pytest.approx(expected, rel=1e-12)
    assert kernel_distance(x, y)[0] == pytest.approx(expected, rel=1e-12)  # all images at once


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_agrees_with_torch_fidelity(dtype: type) -> None:
    from torch_fidelity.metric_kid import kid_features_to_metric

    x, y = features(0, 90, 24).astype(dtype), features(1, 90, 24, shift=0.3).astype(dtype)
    theirs = kid_features_to_metric(
        torch.from_numpy(x), torch.from_numpy(y), kid_subset_size=90, kid_subsets=2, verbose=False
    )["kernel_inception_distance_mean"]
    found, _ = kernel_distance(torch.from_numpy(x), torch.from_numpy(y))
    assert found == pytest.approx(theirs, rel=1e-5)


def test_subsets_average_to_torch_fidelitys_mean() -> None:
    from torch_fidelity.metric_kid import kid_features_to_metric

    x, y = features(2, 400), features(3, 300, shift=0.5)
    theirs = kid_features_to_metric(
        torch.from_numpy(x), torch.from_numpy(y), kid_subset_size=50, kid_subsets=200, verbose=False
    )
    found, error = kernel_distance(x, y, subset=50, subsets=200)
    noise = theirs["kernel_inception_distance_std"] / np.sqrt(200)
    assert abs(found - theirs["kernel_inception_distance_mean"]) < 4 * np.sqrt(2) * noise
    assert error > noise  # subsets share images


def test_is_zero_on_average_for_one_distribution_and_may_be_negative() -> None:
    found = [kernel_distance(features(k, 40), features(k + 500, 40), subsets=2) for k in range(60)]
    values = np.array([value for value, _ in found])
    assert values.min() < 0 < values.max()
    assert abs(values.mean()) < 3.5 * values.std(ddof=1) / np.sqrt(len(values))


@pytest.mark.parametrize(
    ("n_a", "n_b", "subset"), [(80, 80, 1000), (240, 60, 1000), (300, 300, 30)]
)
def test_standard_error_is_the_spread_over_new_images(n_a: int, n_b: int, subset: int) -> None:
    found = [
        kernel_distance(
            features(k, n_a, shift=0.6), features(k + 500, n_b), subset=subset, subsets=50
        )
        for k in range(60)
    ]
    spread = np.std([value for value, _ in found], ddof=1)
    assert 0.75 * spread < np.mean([error for _, error in found]) < 1.4 * spread


def test_is_a_function_of_its_seed_that_leaves_its_input() -> None:
    x, y = features(0, 50), features(1, 70)
    before = x.copy()
    first = kernel_distance(x, y, subset=20, subsets=5, seed=1)
    assert first == kernel_distance(x, y, subset=20, subsets=5, seed=1)
    assert first[0] != kernel_distance(x, y, subset=20, subsets=5, seed=2)[0]
    np.testing.assert_array_equal(x, before)


def test_sets_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(UserError, match="one network"):
        kernel_distance(features(0, 9, 3), features(0, 9, 4))
    with pytest.raises(UserError, match="3 images are too few"):
        kernel_distance(features(0, 3), features(0, 9))


def test_features_other_than_inceptions_are_taken_in_units_of_their_size():
    real = np.random.default_rng(0).normal(size=(50, 8)) * 7
    assert kernel_unit(real, "FID") == 1
    assert kernel_unit(real, "FD (digits-cnn)") == pytest.approx((real**2).mean() ** 0.5)
    assert kernel_unit(100 * real, "FD (x)") == pytest.approx(100 * kernel_unit(real, "FD (x)"))
    assert kernel_unit(0 * real, "FD (x)") == 1
