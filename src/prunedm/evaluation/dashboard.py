"""comparison_dashboard.png: quality, size, speed and their trade-offs on one sheet."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from prunedm.evaluation import table
from prunedm.evaluation.results import Evaluation, LayerFigures
from prunedm.tables import METRICS

_COSTS = {"latency_ms": "latency (ms)", "bytes_packed": "packed (MB)", "macs": "MACs (M)"}
_SCALES = {"bytes_packed": 1e-6, "bytes_disk": 1e-6, "macs": 1e-6}


def dashboard(rows: Sequence[Evaluation], path: Path) -> None:
    """Six panels: quality, size, latency; and quality against latency, size and MACs.

    Lower left is better in the last three; a line joins the Pareto front.
    """
    figure = Figure(figsize=(15, 8.4), layout="constrained")
    FigureCanvasAgg(figure)
    top, low = figure.subplots(2, 3)
    quality = table.quality(rows)
    key, name = quality.key, table.header(quality, rows)
    _bars(top[0], rows, [key])
    top[0].set_title(f"quality: {name}, lower is better", fontsize=10)
    _bars(top[1], rows, ["bytes_disk", "bytes_packed"])
    top[1].set_title("size (MB)", fontsize=10)
    _latencies(top[2], rows)
    for axes, (cost, label) in zip(low, _COSTS.items(), strict=True):
        _pareto(axes, rows, cost=cost, quality=key)
        axes.set_xlabel(label)
        axes.set_ylabel(name)
    low[1].set_title("lower left is better; the line joins what no other model beats", fontsize=10)
    figure.savefig(path, dpi=90)


def layer_chart(rows: Sequence[Evaluation], path: Path) -> None:
    """The share of weights left in every layer of the models that `sparse` selects."""
    rows = sparse(rows)
    names = list(dict.fromkeys(layer.name for row in rows for layer in row.layers))
    figure = Figure(figsize=(9, 1.5 + 0.18 * len(names)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for row in rows:
        shares = {layer.name: _left(layer) for layer in row.layers}
        places = [shares.get(name, np.nan) for name in names]
        axes.plot(places, range(len(names)), "o", markersize=3, label=row.label)
    axes.set_yticks(range(len(names)), names, fontsize=6)
    axes.invert_yaxis()
    axes.set_xlim(0, 105)
    axes.set_xlabel("weights left (%)")
    if rows:
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=90)


def sparse(rows: Sequence[Evaluation]) -> list[Evaluation]:
    """The models with over 1 % zeros in some layer; a few weights are zero in any model."""
    return [row for row in rows if any(_left(layer) < 99 for layer in row.layers)]


def _left(layer: LayerFigures) -> float:
    return 100 * layer.nonzero / layer.weights


def _value(row: Evaluation, key: str) -> float:
    value = getattr(row.figures, key)
    unknown = value is None or (key in _SCALES and not value)  # 0 where counting failed
    return float("nan") if unknown else float(value) * _SCALES.get(key, 1.0)


def _bars(axes: Any, rows: Sequence[Evaluation], keys: Sequence[str]) -> None:
    width = 0.8 / len(keys)
    for number, metric in enumerate(METRICS[key] for key in keys):
        heights = [_value(row, metric.key) for row in rows]
        spread = [_value(row, metric.spread) for row in rows] if metric.spread else None
        places = np.arange(len(rows)) + (number - (len(keys) - 1) / 2) * width
        axes.bar(places, heights, width, yerr=spread, capsize=3, label=metric.header)
    axes.set_xticks(range(len(rows)), [row.label for row in rows], rotation=30, fontsize=8)
    if len(keys) > 1:
        axes.legend(fontsize=8)


def _latencies(axes: Any, rows: Sequence[Evaluation]) -> None:
    for row in rows:
        plain = [t for t in row.figures.timings if not t.compiled and "autocast" not in t.dtype]
        plain.sort(key=lambda timing: timing.batch)
        axes.errorbar(
            [timing.batch for timing in plain],
            [timing.median_ms / timing.batch for timing in plain],
            yerr=[timing.spread_ms / timing.batch for timing in plain],
            marker="o",
            capsize=3,
            label=row.label,
        )
    axes.set_title("latency per image (ms) by batch size", fontsize=10)
    axes.set_xlabel("batch size")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)


def _pareto(axes: Any, rows: Sequence[Evaluation], *, cost: str, quality: str) -> None:
    points = [(_value(row, cost), _value(row, quality)) for row in rows]
    known = {k: point for k, point in enumerate(points) if np.isfinite(point).all()}
    front = [[*known.values()][k] for k in table.pareto([*known.values()])]
    axes.plot([cost for cost, _ in front], [quality for _, quality in front], color="gray")
    for k, point in known.items():
        axes.scatter(*point, color=f"C{k % 10}", zorder=3)
        axes.annotate(rows[k].label, point, textcoords="offset points", xytext=(5, 4), fontsize=8)
    axes.margins(0.2)
