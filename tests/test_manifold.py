"""Precision and recall: brute force, torch-fidelity, what they mean."""

import numpy as np
import pytest
import torch

from prunedm.errors import UserError
from prunedm.evaluation.manifold import precision_recall, share_error


def features(seed: int, count: int, dim: int = 3) -> torch.Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


def share_inside(points: np.ndarray, members: np.ndarray, k: int) -> float:
    inside = 0
    for point in points:
        for member in members:
            radius = sorted(np.linalg.norm(other - member) for other in members)[k]
            if np.linalg.norm(point - member) <= radius:
                inside += 1
                break
    return inside / len(points)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("chunk", [1, 7, 512])
def test_is_brute_force(k: int, chunk: int) -> None:
    real, generated = features(0, 23), features(1, 17) * 1.5 + 0.5
    found = precision_recall(real, generated, neighbours=k, chunk=chunk)
    r, g = real.double().numpy(), generated.double().numpy()
    assert found == (share_inside(g, r, k), share_inside(r, g, k))
    assert 0 < found[0] < 1


@pytest.mark.parametrize("k", [3, 5])
def test_agrees_with_torch_fidelity(k: int) -> None:
    from torch_fidelity.metric_prc import prc_features_to_metric

    real, generated = features(2, 300, 8).double(), features(3, 200, 8).double() * 1.2 + 0.4
    theirs = prc_features_to_metric(generated, real, prc_neighborhood=k, verbose=False)
    found = precision_recall(real, generated, neighbours=k)
    assert found == (pytest.approx(theirs["precision"]), pytest.approx(theirs["recall"]))
    assert found[0] != found[1]


def test_a_generator_of_one_mode_is_precise_and_recalls_half() -> None:
    modes = torch.tensor([[0.0, 0.0, 0.0], [100.0, 0.0, 0.0]])
    real = features(0, 200) + modes.repeat_interleave(100, 0)
    precision, recall = precision_recall(real, features(1, 200))
    assert precision > 0.9
    assert recall == pytest.approx(0.5, abs=0.06)


def test_equal_sets_and_distant_ones_are_the_extremes() -> None:
    x = features(0, 40) + 1e4  # far from zero, where squares cancel
    assert precision_recall(x, x) == (1.0, 1.0)
    assert precision_recall(x, x + 50) == (0.0, 0.0)


def test_error_of_a_share_is_binomial() -> None:
    assert share_error(0.5, 100) == pytest.approx(0.05)
    assert share_error(1.0, 100) == 0


def test_sets_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(UserError, match="3 images are too few for 3 neighbours each"):
        precision_recall(features(0, 9), features(1, 3))
    with pytest.raises(UserError, match="one network"):
        precision_recall(features(0, 9, 3), features(0, 9, 4))
