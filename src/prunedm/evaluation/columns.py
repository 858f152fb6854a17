"""The columns of the table of results: each figure's name, meaning, text, and better direction."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from prunedm.evaluation.results import Figures

_DECIMAL = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))
_LOSS = ("dataset", "problems", "seed", "prediction", "schedule")
_DRAWN = ("samples", "features")
_SIZE = ("size",)
_FD = ("dataset", "features", "samples", "reference", "sampler", "spacing", "seed")
IDENTICAL = "identical"


@dataclass(frozen=True)
class Column:
    """One figure: what it is called, what it means, how it reads, and which way is better.

    `text(figures, base)` is only called where the figure was measured; `base` is the dense model's
    value, whose unit the whole column takes. Two models compare only if the conditions named in
    `same` agree. A figure without `better` shows no change to dense. Where one of `steps` failed,
    there is no figure.
    """

    key: str  # the field of Figures
    header: str
    meaning: str
    text: Callable[[Figures, float], str]
    better: Literal["lower", "higher", ""] = "lower"
    spread: str = ""  # the field of Figures that holds ±
    same: tuple[str, ...] = ()
    steps: tuple[str, ...] = ()
    instead: Callable[[Figures], str] = lambda figures: ""  # what reads where there is no number


def amount(value: float, base: float, *, unit: str = "") -> str:
    """`value` with three digits or so, in the decimal unit of `base`: "0.78M" beside "1.08M"."""
    if value and not 0.1 * _scale(base)[0] <= value < 1e4 * _scale(base)[0]:
        base = value
    scale, letter = _scale(base)
    digits = 0 if scale == 1 else max(0, 2 - int(math.log10(max(base, 1) / scale)))
    return f"{value / scale:.{digits}f}{' ' if unit else ''}{letter}{unit}"


def _scale(value: float) -> tuple[float, str]:
    return next((pair for pair in _DECIMAL if value >= pair[0]), _DECIMAL[-1])


def _count(key: str, *, unit: str = "") -> Callable[[Figures, float], str]:
    return lambda figures, base: amount(getattr(figures, key), base, unit=unit)


def _fixed(key: str, digits: int) -> Callable[[Figures, float], str]:
    return lambda figures, base: f"{getattr(figures, key):.{digits}f}"


def wide(value: float) -> str:
    """Two decimals, or three digits of what has many: kernel distances grow with the features."""
    return f"{value:.2f}" if abs(value) < 1e4 else f"{value:.3g}"


def _validity(figures: Figures, base: float) -> str:
    # rounded down: what is not whole never reads 100 %
    share = f"{math.floor(1000 * (figures.nm_valid or 0)) / 10:g} %"
    plural = "" if figures.nm_layers == 1 else "s"
    return f"{share} of {figures.pattern} in {figures.nm_layers} layer{plural}"


COLUMNS: tuple[Column, ...] = (
    Column(
        "loss",
        "loss",
        "mean denoising loss on the held-out problems ± its standard error",
        _fixed("loss", 4),
        spread="loss_se",
        same=_LOSS,
        steps=("loss",),
    ),
    Column(
        "fd",
        "FD",
        "Fréchet distance of the samples to held-out images, in the features named ± its standard "
        "error by bootstrap",
        _fixed("fd", 2),
        spread="fd_se",
        same=_FD,
        steps=(*_DRAWN, "fd"),
    ),
    Column(
        "kid",
        "KID ×1000",
        "kernel distance in the same features (but Inception's in units of their root mean square), "
        "times 1000 ± its standard error",
        lambda figures, base: wide(figures.kid or 0.0),
        spread="kid_se",
        same=_FD,
        steps=(*_DRAWN, "kid"),
    ),
    Column(
        "precision",
        "precision",
        "share of the samples within the manifold of held-out images",
        _fixed("precision", 3),
        better="higher",
        spread="precision_se",
        same=_FD,
        steps=(*_DRAWN, "precision and recall"),
    ),
    Column(
        "recall",
        "recall",
        "share of the held-out images within the manifold of samples",
        _fixed("recall", 3),
        better="higher",
        spread="recall_se",
        same=_FD,
        steps=(*_DRAWN, "precision and recall"),
    ),
    Column(
        "psnr_db",
        "PSNR to dense",
        "likeness of each image to the dense model's from the same noise, median, in dB",
        lambda figures, base: f"{figures.psnr_db:.1f} dB",
        better="higher",
        spread="psnr_se",
        same=_FD,
        steps=("samples", "paired"),
        instead=lambda figures: IDENTICAL if (figures.identical or 0) >= 0.5 else "",
    ),
    Column(
        "ssim",
        "SSIM to dense",
        "structural similarity of each image to the dense model's from the same noise, median",
        _fixed("ssim", 3),
        better="higher",
        spread="ssim_se",
        same=_FD,
        steps=("samples", "paired"),
    ),
    Column(
        "params",
        "parameters",
        "weights and biases of the denoiser",
        _count("params"),
        steps=_SIZE,
    ),
    Column("nonzero", "non-zero", "parameters that are not zero", _count("nonzero"), steps=_SIZE),
    Column(
        "sparsity",
        "sparsity",
        "share of the model's own parameters that are zero; removed channels do not count",
        lambda figures, base: f"{100 * (figures.sparsity or 0):.1f} %",
        better="",
        steps=_SIZE,
    ),
    Column(
        "macs",
        "MACs",
        "multiply-accumulates of one image through the denoiser once, attention included",
        _count("macs"),
        steps=("macs",),
    ),
    Column(
        "bytes_disk",
        "disk",
        "bytes of the denoiser's weight files",
        _count("bytes_disk", unit="B"),
        steps=_SIZE,
    ),
    Column(
        "bytes_packed",
        "packed (fp16)",
        "bytes in half precision; layers with N:M masks as their kept values and one bit a weight",
        _count("bytes_packed", unit="B"),
        steps=_SIZE,
    ),
    Column(
        "compression",
        "compression",
        "the dense model's packed bytes over this model's",
        lambda figures, base: f"×{figures.compression:.2f}",
        better="",
        steps=_SIZE,
    ),
    Column(
        "latency_ms",
        "latency ms",
        "one denoiser call: median ± half the distance between the quartiles",
        _fixed("latency_ms", 2),
        spread="latency_spread_ms",
        same=("device", "dtype", "latency_batch"),
        steps=("latency",),
    ),
    Column(
        "peak_memory_mb",
        "peak MB",
        "most memory that one call holds, weights included, at the largest timed batch, in MB",
        _fixed("peak_memory_mb", 1),
        same=("device", "dtype"),
        steps=("memory",),
    ),
    Column(
        "nm_valid",
        "N:M",
        "share of groups of M weights with at most N that are not zero, over the masked layers",
        _validity,
        better="",
        steps=_SIZE,
    ),
)
LOSS = COLUMNS[0]
