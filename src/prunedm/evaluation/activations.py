"""Activation statistics by layer and time bin: norms, outlier channels, and the share of the mean.

Shapes: B time bins (cleanest first), I input channels.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from pydantic import BaseModel

LIKELY = 0.05  # share of outlier channels above which an activation-aware score should help


class LayerActivations(BaseModel):
    """One layer's inputs, in lists over time bins. A channel's norm is its root mean square."""

    rms: list[float]  # over all channels
    largest: list[float]  # largest channel norm / median channel norm
    outliers: list[float]  # share of channels above `outlier` times the median
    mean_share: float  # E[x]^2 / E[x^2]: 1 for a constant input
    drift: float  # 1 - cosine similarity of the cleanest and the noisiest bin's channel norms


class ScoreTrial(BaseModel):
    """Held-out loss of the model pruned by each score, without fine-tuning."""

    pattern: str
    dense: float
    losses: dict[str, float]
    standard_error: dict[str, float]  # of the difference to magnitude, problem by problem


class Activations(BaseModel):
    """All layers, and their time bins."""

    bins: list[tuple[int, int]]  # first and last timestep
    outlier: float
    layers: dict[str, LayerActivations]

    @property
    def outlier_ratio(self) -> float:
        """Mean over layers and bins."""
        return float(np.mean([np.mean(layer.outliers) for layer in self.layers.values()]))

    @property
    def mean_share(self) -> float:
        """Median over layers."""
        return float(np.median([layer.mean_share for layer in self.layers.values()]))


def layer_activations(
    squares_B: torch.Tensor, variance: torch.Tensor, *, outlier: float
) -> LayerActivations:
    """From one layer's `input_squares` and `input_variances`; a kernel's taps are averaged."""
    squares_BI = squares_B.flatten(2).mean(2) if squares_B.ndim > 2 else squares_B
    norms_BI = squares_BI.sqrt()
    ratio_BI = norms_BI / norms_BI.median(1, keepdim=True).values.clamp_min(1e-12)
    total = float(squares_B.mean())
    cosine = torch.cosine_similarity(norms_BI[0], norms_BI[-1], dim=0)
    return LayerActivations(
        rms=squares_BI.mean(1).sqrt().tolist(),
        largest=ratio_BI.amax(1).tolist(),
        outliers=(ratio_BI > outlier).double().mean(1).tolist(),
        mean_share=max(0.0, 1 - float(variance.mean()) / total) if total else 0.0,
        drift=float(1 - cosine),
    )


def verdict(found: Activations, trial: ScoreTrial) -> str:
    """Whether an activation-aware score should help, and whether it did in the trial."""
    ratio, losses = found.outlier_ratio, trial.losses
    expected = ratio > LIKELY
    aware = min((s for s in losses if s != "magnitude"), key=lambda s: losses[s])
    gained = losses["magnitude"] - losses[aware]
    clear = abs(gained) > 2 * trial.standard_error[aware]
    outcome = (
        f"{aware} loses {'less' if gained > 0 else 'more'} than magnitude"
        if clear
        else f"{aware} and magnitude lose equally"
    )
    agrees = "and" if (clear and gained > 0) == expected else "but"
    return (
        f"{ratio:.1%} of the input channels are outliers (above {found.outlier:g}x their layer's "
        f"median), so an activation-aware score is {'likely' if expected else 'unlikely'} to help; "
        f"{agrees} tried at {trial.pattern}, {outcome} (loss {losses[aware]:.4f} against "
        f"{losses['magnitude']:.4f}, dense {trial.dense:.4f}). "
        f"{found.mean_share:.0%} of a typical layer's E[x^2] comes from its mean, which wanda counts "
        "and fluctuation does not."
    )


def heat_map(found: Activations, path: Path) -> None:
    """Rows are layers, columns time bins: norms relative to the layer's mean, and outlier channels."""
    names = list(found.layers)
    rms = np.array([layer.rms for layer in found.layers.values()])
    relative = rms / np.maximum(rms.mean(1, keepdims=True), 1e-12)
    largest = np.array([layer.largest for layer in found.layers.values()])
    figure = Figure(figsize=(13, 2 + 0.2 * len(names)), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    spread = max(0.05, float(np.abs(relative - 1).max()))
    panels = (
        (left, relative, "norm over the layer's mean", "coolwarm", 1 - spread, 1 + spread),
        (right, largest, "largest channel over the median one", "viridis", 1.0, largest.max()),
    )
    for axes, values, title, colours, low, high in panels:
        image = axes.imshow(values, aspect="auto", cmap=colours, vmin=low, vmax=high)
        axes.set_title(title)
        axes.set_xlabel("timesteps (cleanest first)")
        labels = [f"{first}-{last}" for first, last in found.bins]
        axes.set_xticks(range(len(labels)), labels, rotation=60, fontsize=7)
        figure.colorbar(image, ax=axes, shrink=0.5, pad=0.01)
    left.set_yticks(range(len(names)), _short(names), fontsize=7)
    figure.savefig(path, dpi=110)


def _short(names: Sequence[str]) -> list[str]:
    return [name.replace("_blocks", "").replace("attentions", "attn") for name in names]
