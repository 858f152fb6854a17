"""A metric: its column in every table, what it means, and the step that measures it.

To add one: a file with the record, and a line in `tables.METRICS`. Result files, tables, the summary,
the report, sweeps and the terminal take it from there.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from prunedm.architecture import Inputs
from prunedm.evaluation.results import Figures
from prunedm.masks import Masks
from prunedm.progress import Progress
from prunedm.task import Stream

_DECIMAL = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))
_IMAGES = ("dataset", "features", "samples", "reference", "sampler", "spacing", "seed")
# what a measurement needs, cheapest first -> the conditions that its figures depend on
NEEDS: dict[str, tuple[str, ...]] = {
    "weights": (),
    "problems": ("dataset", "problems", "length", "seed", "prediction", "schedule"),
    "tasks": ("task_examples",),
    "calls": ("device", "dtype"),
    "samples": _IMAGES,
    "features": _IMAGES,
    "pairs": _IMAGES,
    "turns": ("device", "dtype", "latency_batch"),
}
_BEFORE = {"samples": ("samples",), "features": ("samples", "features"), "pairs": ("samples",)}


@dataclass(frozen=True)
class Subject:
    """One model to measure. Shapes: N images, D features."""

    denoiser: nn.Module
    masks: Masks | None
    example: Callable[[int], Inputs]  # batch size -> inputs
    bytes_disk: Callable[[], int]
    problems: Callable[[], Stream]  # held-out denoising problems
    device: torch.device
    largest_batch: int  # of the batch sizes that are timed
    seed: int
    folder: Path  # where measurements may leave files
    progress: Progress
    text: bool = False  # a language model
    stride: int = 0  # tokens between the windows of a strided perplexity; 0: not wanted
    images_NHWC: np.ndarray | None = None  # the samples, from step "samples" on
    features_ND: tuple[torch.Tensor, torch.Tensor] | None = None  # of samples and held-out images
    features: str = ""  # name of the feature network

    @property
    def compared_ND(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Features of the samples and of held-out images, for measurements that need "features"."""
        assert self.features_ND is not None
        return self.features_ND


@dataclass(frozen=True)
class Measurement:
    """A step that measures figures of one model, by name; for pairs and turns, of all models at once."""

    step: str
    needs: Literal["weights", "problems", "tasks", "calls", "samples", "features", "pairs", "turns"]
    figures: Callable[[Subject], dict[str, Any]] | None = None


@dataclass(frozen=True)
class Metric:
    """One figure: its name, meaning and format, and which direction is better.

    `text(value, base)`: `base` is the dense model's value, which sets the unit of the whole column. A
    figure without `better` shows no change to dense. Chinese words are in `report/words.zh.yaml`.
    """

    key: str  # its name in `Figures`
    header: str
    meaning: str
    text: Callable[[float, float], str]
    measured: Measurement
    better: Literal["lower", "higher", ""] = "lower"
    of: Literal["images", "texts", ""] = ""  # what models it is for make; "" is for all
    spread: str = ""  # name in `Figures` of its standard error or spread
    unit: str = ""
    change: str = ""  # name of its mean change to dense, case by case; the error is `{change}_se`
    also: tuple[str, ...] = ()  # names of further figures that belong to it
    # a sentence on the conditions, filled from `Conditions` and `Figures`
    conditions: str = ""
    each: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None  # of pairs: image by image
    note: Callable[[tuple[int, ...]], str] = lambda size: ""  # a caveat for images of (H, W)
    named: Callable[[str], str] = lambda features: ""  # another header, by the features' name
    detail: Callable[[Figures], str] = lambda figures: ""  # text after the number
    instead: Callable[[Figures], str] = lambda figures: ""  # text in place of a number

    @property
    def fields(self) -> tuple[str, ...]:
        changes = (self.change, f"{self.change}_se") if self.change else ()
        return self.key, *([self.spread] if self.spread else []), *changes, *self.also

    @property
    def same(self) -> tuple[str, ...]:
        """The conditions in which two models must agree for the figure to compare."""
        return NEEDS[self.measured.needs]

    @property
    def steps(self) -> tuple[str, ...]:
        """The steps without which there is no figure."""
        return *_BEFORE.get(self.measured.needs, ()), self.measured.step


def amount(value: float, base: float, *, unit: str = "") -> str:
    """`value` to about three digits, in the decimal unit of `base`: "0.78M" beside "1.08M"."""
    if value and not 0.1 * _scale(base)[0] <= value < 1e4 * _scale(base)[0]:
        base = value
    scale, letter = _scale(base)
    digits = 0 if scale == 1 else max(0, 2 - int(math.log10(max(base, 1) / scale)))
    return f"{value / scale:.{digits}f}{' ' if unit else ''}{letter}{unit}"


def _scale(value: float) -> tuple[float, str]:
    return next((pair for pair in _DECIMAL if value >= pair[0]), _DECIMAL[-1])


def fixed(digits: int) -> Callable[[float, float], str]:
    return lambda value, base: f"{value:.{digits}f}"


def wide(value: float, base: float = 0.0) -> str:
    """Two decimals, or three digits from 10,000 on: kernel distances grow with the features."""
    return f"{value:.2f}" if abs(value) < 1e4 else f"{value:.3g}"
