"""Kernel distance (Binkowski et al. 2018, arXiv:1801.01401): KID where the features are Inception's.

The squared maximum mean discrepancy under the kernel (x.y / D + 1)^3. Its estimate is unbiased at
every number of images, unlike the Fréchet distance's, so it may be slightly negative.
Shapes: N images, D features, M images in a subset. All arithmetic is in float64.
"""

import math

import numpy as np
import torch

from prunedm.errors import UserError
from prunedm.evaluation.metric import Measurement, Metric, Subject, wide

LEAST_IMAGES = 4  # on each side: each half must have a pair
ERROR_DRAWS = 40  # subsets of each side behind the standard error


def kernel_distance(
    a_ND: torch.Tensor | np.ndarray,
    b_ND: torch.Tensor | np.ndarray,
    *,
    subset: int = 1000,
    subsets: int = 100,
    seed: int = 0,
) -> tuple[float, float]:
    """The mean over random subsets of `subset` images of each side, and its standard error.

    Subsets are drawn without replacement; a side with fewer images gives all of them. Subsets share
    images, so their spread over sqrt(subsets) would underestimate the error. It is instead the
    delete-d jackknife's (Shao & Wu 1989) of each side with the other fixed, on subsets of at most half
    of the images, plus the variance from the finite number of subsets. Raises `UserError` for fewer
    than four images on a side, and for features of different dimensions.
    """
    a_ND, b_ND = np.asarray(a_ND), np.asarray(b_ND)
    fewest = min(len(a_ND), len(b_ND))
    if a_ND.ndim != 2 or a_ND.shape[1:] != b_ND.shape[1:]:
        raise UserError(
            f"features are {a_ND.shape} and {b_ND.shape}; compute both with one network"
        )
    if fewest < LEAST_IMAGES:
        raise UserError(f"{fewest} images are too few for a kernel distance; give four or more")
    assert min(subset, subsets) >= 2
    size = min(subset, fewest)
    draws = 1 if size == len(a_ND) == len(b_ND) else subsets
    found = [
        squared_discrepancy(_rows(a_ND, size, (seed, 0, k)), _rows(b_ND, size, (seed, 1, k)))
        for k in range(draws)
    ]
    half = min(subset, fewest // 2)
    variance = _jackknife(a_ND, b_ND, half, (seed, 2)) + _jackknife(b_ND, a_ND, half, (seed, 3))
    variance += float(np.var(found, ddof=1)) / draws if draws > 1 else 0.0
    return float(np.mean(found)), math.sqrt(variance)


def kernel_unit(real_ND: torch.Tensor | np.ndarray, features: str) -> float:
    """The scale to divide both sides' features by before `kernel_distance`.

    The kernel assumes features of order one. Inception's ("FID") are, and stay unscaled, so that KID is
    what others report. Others are scaled by the real images' root mean square; the kernel's cube would
    otherwise give values in the thousands or near zero.
    """
    if features == "FID":
        return 1.0
    square = float(np.square(np.asarray(real_ND, dtype=np.float64)).mean())
    return math.sqrt(square) or 1.0


def squared_discrepancy(x_MD: np.ndarray, y_MD: np.ndarray) -> float:
    """The unbiased estimate from images x and y."""
    return _within(x_MD) + _within(y_MD) - 2 * float(_kernel(x_MD, y_MD).mean())


def _jackknife(x_ND: np.ndarray, y_ND: np.ndarray, size: int, seed: tuple[int, int]) -> float:
    """Variance from sampling x, with y fixed; `size` is at most half of x."""
    y_MD = _rows(y_ND, size, (*seed, 0))
    drawn = (_rows(x_ND, size, (*seed, k)) for k in range(1, 1 + ERROR_DRAWS))
    found = [_within(x_MD) - 2 * float(_kernel(x_MD, y_MD).mean()) for x_MD in drawn]
    return float(np.var(found, ddof=1)) * size / (len(x_ND) - size)


def _rows(x_ND: np.ndarray, size: int, seed: tuple[int, ...]) -> np.ndarray:
    """(M, D). Draw k of a purpose depends on (seed, purpose, k) alone."""
    rows_M = np.random.default_rng(seed).permutation(len(x_ND))[:size]
    return np.asarray(x_ND[rows_M], dtype=np.float64)


def _within(x_MD: np.ndarray) -> float:
    kernel_MM, size = _kernel(x_MD, x_MD), len(x_MD)
    return float((kernel_MM.sum() - np.trace(kernel_MM)) / (size * (size - 1)))


def _kernel(x_MD: np.ndarray, y_KD: np.ndarray) -> np.ndarray:
    kernel_MK = x_MD @ y_KD.T
    kernel_MK /= x_MD.shape[1]
    kernel_MK += 1
    return np.asarray(kernel_MK * kernel_MK * kernel_MK)


def _figures(of: Subject) -> dict[str, float]:
    own_ND, real_ND = of.compared_ND
    unit = kernel_unit(real_ND, of.features)
    mean, error = kernel_distance(own_ND / unit, real_ND / unit, seed=of.seed)
    return {"kid": 1000 * mean, "kid_se": 1000 * error}


KID = Metric(
    "kid",
    "KID ×1000",
    "kernel distance in the same features (but Inception's in units of their root mean square), "
    "times 1000 ± its standard error",
    wide,
    Measurement("kid", "features", _figures),
    spread="kid_se",
    named=lambda features: "" if features == "FID" else "KD ×1000",
    of="images",
)
