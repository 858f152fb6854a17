"""Fréchet distance: closed forms, scipy, torch-fidelity, files, errors."""

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from prunedm.errors import UserError, masked
from prunedm.evaluation import fid
from prunedm.evaluation.fid import (
    Statistics,
    bootstrap_error,
    frechet_distance,
    load_statistics,
    save_statistics,
    statistics,
)


def random_covariance(seed: int, dim: int, rank: int | None = None) -> np.ndarray:
    factor = np.random.default_rng(seed).normal(size=(dim, rank or 2 * dim))
    return factor @ factor.T / factor.shape[1]


def gaussian(seed: int, dim: int, sigma_DD: np.ndarray | None = None) -> Statistics:
    mu_D = np.random.default_rng(seed + 1000).normal(size=dim)
    return Statistics(mu_D, random_covariance(seed, dim) if sigma_DD is None else sigma_DD)


def test_diagonal_covariances_have_a_closed_form() -> None:
    rng = np.random.default_rng(0)
    s, t = rng.uniform(0.1, 3, 12), rng.uniform(0.1, 3, 12)
    a, b = gaussian(1, 12, np.diag(s**2)), gaussian(2, 12, np.diag(t**2))
    expected = ((a.mu_D - b.mu_D) ** 2).sum() + ((s - t) ** 2).sum()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-12)


def test_commuting_covariances_have_a_closed_form() -> None:
    rng = np.random.default_rng(3)
    basis, _ = np.linalg.qr(rng.normal(size=(20, 20)))
    s, t = rng.uniform(0.1, 3, 20), rng.uniform(0.1, 3, 20)
    a = gaussian(1, 20, basis @ np.diag(s**2) @ basis.T)
    b = gaussian(2, 20, basis @ np.diag(t**2) @ basis.T)
    expected = ((a.mu_D - b.mu_D) ** 2).sum() + ((s - t) ** 2).sum()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("rank", [60, 5])
def test_equal_covariances_leave_the_distance_of_the_means(rank: int) -> None:
    """Also where they are singular, where roots of eigenvalues are only good to 1e-8 each."""
    sigma_DD = random_covariance(4, 30, rank)
    a, b = gaussian(1, 30, sigma_DD), gaussian(2, 30, sigma_DD)
    expected = float(((a.mu_D - b.mu_D) ** 2).sum())
    assert frechet_distance(a, b) == pytest.approx(expected, abs=1e-11)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-11)


@pytest.mark.parametrize("dim", [1, 2, 17, 64])
def test_agrees_with_the_matrix_root_of_scipy(dim: int) -> None:
    a, b = gaussian(5, dim), gaussian(6, dim)
    root = sqrtm(a.sigma_DD @ b.sigma_DD).real
    expected = ((a.mu_D - b.mu_D) ** 2).sum() + np.trace(a.sigma_DD + b.sigma_DD - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-8)


def test_agrees_with_torch_fidelity() -> None:
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(48, 48, generator=generator)
    x = torch.randn(300, 48, generator=generator) @ mix
    y = torch.randn(500, 48, generator=generator) + 0.5
    theirs = fid_statistics_to_metric(
        fid_features_to_statistics(x), fid_features_to_statistics(y), verbose=False
    )["frechet_inception_distance"]
    assert frechet_distance(statistics(x), statistics(y)) == pytest.approx(theirs, rel=1e-5)


def test_equal_covariances_of_samples_leave_the_distance_of_the_means() -> None:
    x_ND = np.random.default_rng(0).normal(size=(100, 12))
    found = frechet_distance(statistics(x_ND), statistics(x_ND + 0.25))
    assert found == pytest.approx(12 * 0.25**2, rel=1e-9)


def drawn_again(features_ND: np.ndarray, reference: Statistics, draws: int, seed: int) -> float:
    """What `bootstrap_error` computes, by statistics of repeated rows."""
    found = []
    for k in range(draws):
        counts_N = np.random.default_rng((seed, k)).multinomial(
            len(features_ND), np.full(len(features_ND), 1 / len(features_ND))
        )
        found.append(
            frechet_distance(
                statistics(np.repeat(features_ND, counts_N, axis=0)), reference, force=True
            )
        )
    return float(np.std(found, ddof=1))


@pytest.mark.parametrize("count", [60, 8])  # fewer images than features, too
def test_the_bootstrap_is_that_of_repeated_images(count: int) -> None:
    x_ND = np.random.default_rng(1).normal(size=(count, 10)) @ random_covariance(2, 10) + 30
    reference = gaussian(3, 10)
    expected = drawn_again(x_ND, reference, 7, seed=4)
    assert bootstrap_error(x_ND, reference, draws=7, seed=4) == pytest.approx(expected, rel=1e-6)
    as_tensor = bootstrap_error(torch.from_numpy(x_ND), reference, draws=7, seed=4)
    assert as_tensor == bootstrap_error(x_ND, reference, draws=7, seed=4)
    assert as_tensor != bootstrap_error(x_ND, reference, draws=7, seed=5)


def test_the_bootstrap_gives_the_spread_over_new_images() -> None:
    rng = np.random.default_rng(0)
    reference = Statistics(np.full(4, 0.3), np.diag([1.0, 2.0, 0.5, 1.5]))
    samples = [rng.normal(size=(500, 4)) for _ in range(150)]
    spread = np.std([frechet_distance(statistics(x_ND), reference) for x_ND in samples])
    errors = [bootstrap_error(x_ND, reference) for x_ND in samples[:40]]
    assert np.mean(errors) == pytest.approx(spread, rel=0.15)


def test_the_bootstrap_errs_on_the_large_side_between_equal_distributions() -> None:
    rng = np.random.default_rng(0)
    reference = Statistics(np.zeros(16), np.eye(16))
    samples = [rng.normal(size=(300, 16)) for _ in range(80)]
    spread = np.std([frechet_distance(statistics(x_ND), reference) for x_ND in samples])
    errors = [bootstrap_error(x_ND, reference) for x_ND in samples[:20]]
    assert spread < np.mean(errors) < 3 * spread


def test_is_symmetric() -> None:
    a, b = gaussian(7, 40), gaussian(8, 40, random_covariance(8, 40, rank=3))
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-12)


def test_statistics_are_those_of_numpy_in_float64() -> None:
    x_ND = torch.randn(200, 6, generator=torch.Generator().manual_seed(1)) + 1000  # cancels in fp32
    before = x_ND.clone()
    found = statistics(x_ND, features="FD (x)")
    np.testing.assert_allclose(found.mu_D, np.mean(np.float64(x_ND), axis=0), rtol=1e-13)
    np.testing.assert_allclose(found.sigma_DD, np.cov(np.float64(x_ND), rowvar=False), rtol=1e-10)
    assert (found.count, found.features, found.sigma_DD.dtype) == (200, "FD (x)", np.float64)
    assert torch.equal(x_ND, before)
    centred_in_a_copy = np.float64(x_ND)
    statistics(centred_in_a_copy)
    np.testing.assert_array_equal(centred_in_a_copy, np.float64(before))


def test_npz_round_trip_is_exact_and_has_the_layout_of_pytorch_fid(tmp_path) -> None:
    stats = statistics(np.random.default_rng(0).normal(size=(50, 4)), features="FD (é)")
    save_statistics(stats, tmp_path / "stats.npz")
    with np.load(tmp_path / "stats.npz", allow_pickle=False) as file:
        np.testing.assert_array_equal(file["mu"], stats.mu_D)
        np.testing.assert_array_equal(file["sigma"], stats.sigma_DD)
    back = load_statistics(tmp_path / "stats.npz")
    np.testing.assert_array_equal(back.sigma_DD, stats.sigma_DD)
    np.testing.assert_array_equal(back.mu_D, stats.mu_D)
    assert (back.count, back.features) == (50, "FD (é)")


def test_reads_a_file_of_pytorch_fid(tmp_path) -> None:
    np.savez_compressed(tmp_path / "theirs.npz", mu=np.zeros(3), sigma=np.eye(3))
    stats = load_statistics(tmp_path / "theirs.npz")
    assert (stats.dim, stats.count, stats.features) == (3, 0, "")
    named = Statistics(np.ones(3), np.eye(3), 100, "FID")
    assert frechet_distance(stats, named) == pytest.approx(3)  # an unnamed file goes with any


def test_different_dimensions_and_networks_are_refused() -> None:
    with pytest.raises(UserError, match="4 and 5 features"):
        frechet_distance(gaussian(0, 4), gaussian(0, 5))
    a, b = (
        Statistics(np.zeros(2), np.eye(2), 9, "FID"),
        Statistics(np.zeros(2), np.eye(2), 9, "FD (x)"),
    )
    with pytest.raises(UserError, match=r"FID and FD \(x\)"):
        frechet_distance(a, b, force=True)


@pytest.mark.parametrize("count", [5, 8])  # 8 points span 7 dimensions
def test_too_few_samples_are_refused_unless_forced(count: int) -> None:
    few = statistics(np.random.default_rng(0).normal(size=(count, 8)))
    enough = statistics(np.random.default_rng(1).normal(size=(9, 8)))
    for pair in ((few, enough), (enough, few)):
        with pytest.raises(UserError, match=f"{count} images are too few for 8 features"):
            frechet_distance(*pair)
        assert frechet_distance(*pair, force=True) > 0
    assert frechet_distance(enough, enough) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("bad", [np.zeros((1, 4)), np.zeros((0, 4)), np.zeros(4)])
def test_statistics_of_too_little_are_refused(bad: np.ndarray) -> None:
    with pytest.raises(UserError, match="add images"):
        statistics(bad)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_features_that_are_not_finite_are_refused(value: float) -> None:
    x_ND = np.random.default_rng(0).normal(size=(9, 3))
    x_ND[4, 1] = value
    with pytest.raises(UserError, match="NaN or infinite"):
        statistics(x_ND)


@pytest.mark.parametrize(
    "arrays",
    [
        {"mu": np.zeros(3)},
        {"mu": np.zeros(3), "sigma": np.eye(4)},
        {"mu": np.zeros((3, 1)), "sigma": np.eye(3)},
        {"mu": np.zeros(3), "sigma": np.full((3, 3), np.nan)},
        {"mu": np.array([None]), "sigma": np.eye(1)},  # would need pickle
        {"mu": np.array(["x"]), "sigma": np.eye(1)},
    ],
)
def test_files_without_statistics_are_refused(tmp_path, arrays) -> None:
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(UserError, match=r"bad\.npz"):
        load_statistics(tmp_path / "bad.npz")


def test_missing_damaged_and_foreign_files_are_refused(tmp_path) -> None:
    good = tmp_path / "good.npz"
    save_statistics(gaussian(0, 4), good)
    (tmp_path / "cut.npz").write_bytes(good.read_bytes()[:200])
    (tmp_path / "text.npz").write_text("mu")
    (tmp_path / "empty.npz").touch()
    np.save(tmp_path / "array.npy", np.zeros(3))
    for name in ("none.npz", "cut.npz", "text.npz", "empty.npz", "array.npy"):
        with pytest.raises(UserError, match=name):
            load_statistics(tmp_path / name)


def _covariance(kind: str) -> np.ndarray:
    x_DD = np.random.default_rng(0).normal(size=(6, 6))
    return {
        "negative": -np.eye(6),
        "not symmetric": x_DD,
        "one negative eigenvalue": x_DD @ x_DD.T - 2 * np.eye(6),
        "float16": (x_DD @ x_DD.T).astype(np.float16),
        "singular": x_DD[:, :2] @ x_DD[:, :2].T,
        "singular, float32": (x_DD[:, :2] @ x_DD[:, :2].T).astype(np.float32),
        "zero": np.zeros((6, 6)),
    }[kind]


@pytest.mark.parametrize("kind", ["negative", "not symmetric", "one negative eigenvalue"])
def test_a_sigma_that_is_not_a_covariance_is_refused(tmp_path, kind) -> None:
    """It would give a perfect score."""
    np.savez(tmp_path / "bad.npz", mu=np.zeros(6), sigma=_covariance(kind))
    with pytest.raises(UserError, match=r"bad\.npz': sigma is not a covariance"):
        load_statistics(tmp_path / "bad.npz")


@pytest.mark.parametrize("kind", ["singular", "singular, float32", "float16", "zero"])
def test_a_covariance_may_be_singular_and_rounded(tmp_path, kind) -> None:
    np.savez(tmp_path / "good.npz", mu=np.zeros(6), sigma=_covariance(kind))
    assert load_statistics(tmp_path / "good.npz").dim == 6


@pytest.mark.parametrize(
    "said", [{"count": -5}, {"features": "a\nb"}, {"features": "\x1b[2J"}, {"features": "x" * 999}]
)
def test_absurd_words_about_statistics_are_refused(tmp_path, said) -> None:
    np.savez(tmp_path / "bad.npz", mu=np.zeros(2), sigma=np.eye(2), **said)
    with pytest.raises(UserError, match=r"claims .* images") as error:
        load_statistics(tmp_path / "bad.npz")
    assert str(error.value).isprintable()


def test_statistics_that_unpack_to_gigabytes_are_refused_unread(tmp_path, monkeypatch) -> None:
    path = tmp_path / "bomb.npz"
    np.savez_compressed(path, mu=np.zeros(4200, np.uint8), sigma=np.zeros((4200, 4200), np.uint8))
    monkeypatch.setattr(fid, "read_array", None)
    with pytest.raises(UserError, match="too large for what the file holds"):
        load_statistics(path)
    np.savez_compressed(path, mu=np.zeros(1 << 20, np.uint8), sigma=np.zeros((1, 1)))
    with pytest.raises(UserError, match=r"are not \(D,\) and \(D, D\)"):
        load_statistics(path)


def test_what_a_file_says_does_not_command_the_terminal() -> None:
    assert masked("FD\x1b[2J\x07: 5\n") == "FD?[2J?: 5\n"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("mysql://u:pa'ss-word@h/db", "mysql://u:***@h/db"),
        ('a "mysql://u:pa"ss@h/db": no', 'a "mysql://u:***@h/db": no'),
        ("mysql://u:pass word@h/db", "mysql://u:***@h/db"),
        ("https:/u:hunter22@h/x.npz", "https:/u:***@h/x.npz"),
        ("https://hf_abcdef@h/x", "https://***@h/x"),
        ("http://localhost:8080/x, or mail a@b", "http://localhost:8080/x, or mail a@b"),
        ("hf://datasets/owner/name@main/x", "hf://datasets/owner/name@main/x"),
    ],
)
def test_no_form_of_a_password_is_shown(text, shown) -> None:
    assert masked(text) == shown
