"""Paired metrics: two models' images from the same noise, image by image.

Shapes: N images, H W pixels, C channels, K taps of a window.
"""

import numpy as np
from scipy.ndimage import correlate1d

from prunedm.errors import UserError
from prunedm.evaluation.metric import Measurement, Metric, fixed

WINDOW, SIGMA = 11, 1.5  # Wang et al. 2004
IDENTICAL = "identical"
_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2


def psnr(images_NHWC: np.ndarray, reference_NHWC: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio of each uint8 image to its reference, in dB: (N,).

    Identical images give infinity. Raises `UserError` where the two are of different shapes.
    """
    _check(images_NHWC, reference_NHWC)
    difference = images_NHWC.astype(np.float64) - reference_NHWC.astype(np.float64)
    error_N = np.mean(difference**2, axis=(1, 2, 3))
    with np.errstate(divide="ignore"):
        return np.asarray(10 * np.log10(255.0**2 / error_N))


def ssim(images_NHWC: np.ndarray, reference_NHWC: np.ndarray) -> np.ndarray:
    """Structural similarity of each uint8 image to its reference: (N,), 1 for identical ones.

    Wang et al. 2004 (IEEE TIP 13:4): Gaussian windows of 11 pixels that lie wholly within the
    image, sigma 1.5, data range 255; the mean over windows and channels. Smaller images take the
    window that `window_for` gives. Raises `UserError` where the two are of different shapes.
    """
    _check(images_NHWC, reference_NHWC)
    taps_K = _taps(window_for(images_NHWC.shape[1:3]))
    return np.array([_ssim(a, b, taps_K) for a, b in zip(images_NHWC, reference_NHWC, strict=True)])


def median_error(values_N: np.ndarray, *, draws: int = 200, seed: int = 0) -> float:
    """Standard error of the median, by bootstrap."""
    rng = np.random.default_rng(seed)
    picked = rng.integers(0, len(values_N), (draws, len(values_N)))
    return float(np.median(values_N[picked], axis=1).std(ddof=1))


def window_for(size: tuple[int, ...]) -> int:
    """11, or the largest odd number of pixels that fits into images of this size."""
    least = min(size)
    return min(WINDOW, least - 1 + least % 2)


def _small_windows(size: tuple[int, ...]) -> str:
    window = window_for(size)
    small = f"SSIM: windows of {window} pixels, as images of {size[0]}x{size[1]} have no {WINDOW}"
    return small if window < WINDOW else ""


def _ssim(a_HWC: np.ndarray, b_HWC: np.ndarray, taps_K: np.ndarray) -> float:
    """One image, in float64; variances are those of the weighted windows, without correction."""
    x, y = a_HWC.astype(np.float64), b_HWC.astype(np.float64)
    mean_x, mean_y = _windowed(x, taps_K), _windowed(y, taps_K)
    var_x = _windowed(x * x, taps_K) - mean_x**2
    var_y = _windowed(y * y, taps_K) - mean_y**2
    covariance = _windowed(x * y, taps_K) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + _C1) / (mean_x**2 + mean_y**2 + _C1)
    structure = (2 * covariance + _C2) / (var_x + var_y + _C2)
    return float(np.mean(luminance * structure))


def _windowed(image_HWC: np.ndarray, taps_K: np.ndarray) -> np.ndarray:
    """Weighted means of all windows within the image."""
    edge = len(taps_K) // 2
    smooth: np.ndarray = correlate1d(correlate1d(image_HWC, taps_K, axis=0), taps_K, axis=1)
    return smooth[edge : smooth.shape[0] - edge, edge : smooth.shape[1] - edge]


def _taps(window: int) -> np.ndarray:
    offsets_K = np.arange(window) - window // 2
    taps_K = np.exp(-0.5 * (offsets_K / SIGMA) ** 2)
    return np.asarray(taps_K / taps_K.sum())


def _check(images_NHWC: np.ndarray, reference_NHWC: np.ndarray) -> None:
    if images_NHWC.shape != reference_NHWC.shape:
        raise UserError(
            f"images of shapes {images_NHWC.shape} and {reference_NHWC.shape} are not pairs; "
            "draw both from the same noise, in the same number and size"
        )


PAIRED = Measurement("paired", "pairs")
PSNR = Metric(
    "psnr_db",
    "PSNR to dense",
    "likeness of each image to the dense model's from the same noise, median, in dB",
    fixed(1),
    PAIRED,
    better="higher",
    spread="psnr_se",
    unit=" dB",
    also=("identical",),  # share of images that equal the dense model's, so have no PSNR
    conditions="PSNR: against the dense model's image of the same noise; the median.",
    each=psnr,
    instead=lambda figures: IDENTICAL if (figures.identical or 0) >= 0.5 else "",
    of="images",
)
SSIM = Metric(
    "ssim",
    "SSIM to dense",
    "structural similarity of each image to the dense model's from the same noise, median",
    fixed(3),
    PAIRED,
    better="higher",
    spread="ssim_se",
    each=ssim,
    note=_small_windows,
    of="images",
)
