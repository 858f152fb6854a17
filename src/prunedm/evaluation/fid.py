"""Fréchet distance between Gaussians fitted to features (Heusel et al. 2017, arXiv:1706.08500).

Shapes: N images, D features. All arithmetic is in float64.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from prunedm.data.arrays import header_of, keys, read_array
from prunedm.data.files import shown
from prunedm.errors import UserError
from prunedm.evaluation.metric import Measurement, Metric, Subject, fixed

_LARGEST_DIM = 16_384  # features
_SMALL = 1 << 27  # bytes that are always read, whatever the file's size
_PACKED = 20  # most bytes of a float64 covariance per byte of its file
_LONGEST_NAME = 200  # characters
_ROUNDING = 1e-4  # relative to the largest eigenvalue: some tools compute in float32 or less


@dataclass(frozen=True)
class Statistics:
    """Mean and covariance of features. `count` 0 and `features` "" mean that a file does not say."""

    mu_D: np.ndarray
    sigma_DD: np.ndarray
    count: int = 0
    features: str = ""

    @property
    def dim(self) -> int:
        return len(self.mu_D)


def statistics(features_ND: torch.Tensor | np.ndarray, *, features: str = "") -> Statistics:
    """Mean and unbiased covariance; `features` names the network they came from.

    Raises `UserError` for fewer than two rows, and for features that are not finite.
    """
    x_ND = np.array(features_ND, dtype=np.float64)  # a copy: centred in place below
    if x_ND.ndim != 2 or len(x_ND) < 2:
        raise UserError(f"statistics need (N >= 2, D) features; got shape {x_ND.shape}; add images")
    mu_D = x_ND.mean(axis=0)
    if not np.isfinite(mu_D).all():
        raise UserError(f"{features or 'features'}: some are NaN or infinite; check the images")
    x_ND -= mu_D
    return Statistics(mu_D, x_ND.T @ x_ND / (len(x_ND) - 1), len(x_ND), features)


def frechet_distance(a: Statistics, b: Statistics, *, force: bool = False) -> float:
    """|mu_a - mu_b|^2 + tr(A + B - 2 (AB)^{1/2}), with A and B the covariances.

    Raises `UserError` where the two come from different networks, or from too few images for a
    covariance of full rank; `force` lifts the latter.
    """
    check_comparable(a, b)
    for side in (a, b):
        if 0 < side.count <= side.dim and not force:
            raise UserError(
                f"{side.count} images are too few for {side.dim} features: the distance would be "
                f"mostly bias; give more than {side.dim} images, or use features of fewer dimensions"
            )
    gap_D = a.mu_D - b.mu_D
    try:
        with np.errstate(over="ignore", invalid="ignore"):
            traces = np.trace(a.sigma_DD) + np.trace(b.sigma_DD)
            distance = gap_D @ gap_D + traces - 2 * _trace_of_root(a.sigma_DD, b.sigma_DD)
    except np.linalg.LinAlgError:
        distance = math.nan
    if not math.isfinite(distance):
        raise UserError("the distance is not finite: statistics are too large; compute them again")
    return max(0.0, float(distance))  # rounding can leave -1e-13


def check_comparable(a: Statistics, b: Statistics) -> None:
    """Raises `UserError` where the two are known to come from different networks."""
    if a.dim != b.dim:
        raise UserError(
            f"statistics have {a.dim} and {b.dim} features; compute both with the same --features"
        )
    if a.features and b.features and a.features != b.features:
        raise UserError(
            f"statistics are in {a.features} and {b.features}; compute both with the same --features"
        )


def bootstrap_error(
    features_ND: torch.Tensor | np.ndarray, reference: Statistics, *, draws: int = 20, seed: int = 0
) -> float:
    """Bootstrap standard error over images of the distance to a fixed `reference`.

    Only the spread of the draws is meaningful. Their mean is too high: a draw holds about 63% of the
    distinct images, so its covariance is further from the truth than the sample's, and the distance
    is convex in that error. For the same reason the spread is too large, up to about twice, where the
    distance is hardly more than its bias (one distribution on both sides); for larger distances it is
    the spread over new images. Draw k depends on (seed, k) alone. A draw costs an eigenvalue problem
    and N D^2 operations.
    """
    x_ND = np.array(features_ND, dtype=np.float64)  # a copy: centred in place below
    assert x_ND.shape[1:] == reference.mu_D.shape
    assert min(len(x_ND), draws) > 1
    mean_D = x_ND.mean(axis=0)
    x_ND -= mean_D  # the draws' covariances cancel less
    gap_D = mean_D - reference.mu_D
    y_ND = x_ND @ _root(reference.sigma_DD)
    norms_N = np.einsum("nd,nd->n", x_ND, x_ND)
    trace = float(np.trace(reference.sigma_DD))
    found = []
    for k in range(draws):
        rng = np.random.default_rng((seed, k))
        counts_N = rng.multinomial(len(x_ND), np.full(len(x_ND), 1 / len(x_ND)))
        found.append(_drawn_distance(counts_N, x_ND, y_ND, norms_N, gap_D) + trace)
    return float(np.std(found, ddof=1))


def save_statistics(stats: Statistics, path: Path, *, record: str = "") -> None:
    """Write pytorch-fid's layout (`mu`, `sigma`) plus `count`, `features` and `record`."""
    with path.open("wb") as file:  # numpy appends ".npz" to a path without it
        np.savez(
            file, mu=stats.mu_D, sigma=stats.sigma_DD,
            count=np.int64(stats.count), features=np.str_(stats.features), record=np.str_(record),
        )  # fmt: skip


def load_statistics(path: Path) -> Statistics:
    """Statistics from an .npz of ours or of pytorch-fid. Raises `UserError` on any other file."""
    try:
        known = keys(path)
        _check_shapes(path, header_of(path, "mu").shape, header_of(path, "sigma").shape)
        mu_D, sigma_DD = (_floats(path, key) for key in ("mu", "sigma"))
        count = int(read_array(path, "count")) if "count" in known else 0
        features = str(read_array(path, "features")) if "features" in known else ""
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{shown(path)!r} holds no statistics ({error}); give an .npz with the arrays mu and sigma"
        ) from error
    if not (np.isfinite(mu_D).all() and np.isfinite(sigma_DD).all()):
        raise UserError(f"{shown(path)!r} holds NaN or infinity; compute the statistics again")
    if not _is_covariance(sigma_DD):
        raise UserError(
            f"{shown(path)!r}: sigma is not a covariance, which is symmetric and has no negative "
            "eigenvalue; compute the statistics again"
        )
    if count < 0 or not (features.isprintable() and len(features) <= _LONGEST_NAME):
        raise UserError(
            f"{shown(path)!r} claims {count} images and features {shown(repr(features))}; compute "
            "the statistics again"
        )
    return Statistics(mu_D, sigma_DD, count, features)


def _check_shapes(path: Path, mu: tuple[int, ...], sigma: tuple[int, ...]) -> None:
    """Checked before reading: unpacked to float64, an array can be a thousand times its file's size."""
    if len(mu) != 1 or not mu[0] or sigma != (mu[0], mu[0]):
        raise UserError(f"mu {mu} and sigma {sigma} are not (D,) and (D, D)")
    whole = 8 * mu[0] ** 2
    if mu[0] > _LARGEST_DIM or (whole > _SMALL and whole > _PACKED * path.stat().st_size):
        raise UserError(f"mu {mu} and sigma {sigma} are too large for what the file holds")


def _is_covariance(sigma_DD: np.ndarray) -> bool:
    """Whether the matrix is symmetric and positive semi-definite, up to rounding."""
    allowed = _ROUNDING * float(np.abs(sigma_DD).max())
    if np.abs(sigma_DD - sigma_DD.T).max() > allowed:
        return False
    values_D = np.linalg.eigvalsh(sigma_DD)
    return bool(values_D[0] >= -_ROUNDING * abs(values_D[-1]))


def _floats(path: Path, key: str) -> np.ndarray:
    array = read_array(path, key)
    if array.dtype.kind not in "fiu":
        raise UserError(f"{key} is {array.dtype}")
    return np.asarray(array, dtype=np.float64)


def _drawn_distance(
    counts_N: np.ndarray, x_ND: np.ndarray, y_ND: np.ndarray, norms_N: np.ndarray, gap_D: np.ndarray
) -> float:
    """The distance without the reference's trace, with image n drawn `counts_N[n]` times.

    `x_ND` are centred features, and `y_ND` is x times the root of the reference's covariance, so the
    eigenvalues of y's covariance are those of A^{1/2} B A^{1/2}. Their roots are accurate to 1e-8,
    enough for a spread.
    """
    count = len(counts_N)
    weights_N = counts_N / (count - 1)
    scale = (count - 1) / count
    shift_D, y_D = (weights_N @ x_ND) * scale, (weights_N @ y_ND) * scale
    drawn = counts_N > 0
    rows_KD = y_ND[drawn] * np.sqrt(weights_N[drawn, None])
    sigma_DD = rows_KD.T @ rows_KD - np.outer(y_D, y_D) / scale
    root = np.sqrt(np.linalg.eigvalsh(sigma_DD).clip(min=0)).sum()
    trace = weights_N @ norms_N - shift_D @ shift_D / scale
    moved_D = gap_D + shift_D
    return float(moved_D @ moved_D + trace - 2 * root)


def _trace_of_root(a_DD: np.ndarray, b_DD: np.ndarray) -> float:
    """tr (AB)^{1/2} = tr (A^{1/2} B A^{1/2})^{1/2} = the sum of singular values of B^{1/2} A^{1/2}.

    The eigenvalues of A^{1/2} B A^{1/2} are the squares of these; for singular covariances, taking
    their roots would raise rounding errors from 1e-16 to 1e-8 in each null direction.
    """
    return float(np.linalg.svd(_root(b_DD) @ _root(a_DD), compute_uv=False).sum())


def _root(sigma_DD: np.ndarray) -> np.ndarray:
    """The symmetric square root; negative eigenvalues are zeros with rounding errors."""
    values_D, vectors_DD = np.linalg.eigh(sigma_DD)
    root_DD: np.ndarray = (vectors_DD * np.sqrt(values_D.clip(min=0))) @ vectors_DD.T
    return root_DD


def distance_figures(
    own_ND: torch.Tensor, real_ND: torch.Tensor, features: str, *, seed: int
) -> dict[str, float]:
    """`fd` and `fd_se` between samples and real images, given their features in the named network."""
    own, real = (statistics(x_ND, features=features) for x_ND in (own_ND, real_ND))
    error = bootstrap_error(own_ND, real, seed=seed)
    return {"fd": frechet_distance(own, real), "fd_se": error}


def _figures(of: Subject) -> dict[str, float]:
    return distance_figures(*of.compared_ND, of.features, seed=of.seed)


FD = Metric(
    "fd",
    "FD",
    "Fréchet distance of the samples to held-out images, in the features named ± its standard error "
    "by bootstrap",
    fixed(2),
    Measurement("fd", "features", _figures),
    spread="fd_se",
    conditions="{features}: against {reference} held-out images; ± by bootstrap over the samples. FD is "
    "biased at small n; compare it only at equal n and features.",
    named=lambda features: features,
    of="images",
)
