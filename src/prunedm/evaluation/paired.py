"""Paired measures: two models' images from the same noise, one by one."""

import numpy as np


def psnr(images_NHWC: np.ndarray, reference_NHWC: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio of each uint8 image to its reference, in dB: (N,).

    Identical images give infinity.
    """
    difference = images_NHWC.astype(np.float64) - reference_NHWC.astype(np.float64)
    error_N = np.mean(difference**2, axis=(1, 2, 3))
    with np.errstate(divide="ignore"):
        return np.asarray(10 * np.log10(255.0**2 / error_N))
