"""One definition of the table of results; the terminal, Markdown, CSV and the report draw it."""

import csv
import html
import io
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from prunedm.evaluation.results import Conditions, Evaluation, Figures

NONE = "–"
_DECIMAL = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))
_LOSS = ("dataset", "problems", "seed")
_FD = ("dataset", "features", "samples", "reference", "sampler", "seed")


@dataclass(frozen=True)
class Column:
    """One figure: what it is called, what it means, how it reads, and which way is better.

    `text(figures, base)` is only called where the figure was measured; `base` is the dense model's
    value, whose unit the whole column takes. Two models compare only if the conditions named in
    `same` agree. A figure without `better` shows no change to dense.
    """

    key: str  # the field of Figures
    header: str
    meaning: str
    text: Callable[[Figures, float], str]
    better: Literal["lower", "higher", ""] = "lower"
    spread: str = ""  # the field of Figures that holds ±
    same: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cell:
    """A figure as it is shown: its value, ± its spread, and the change to dense."""

    value: str
    spread: str = ""
    change: str = ""
    tone: Literal["better", "worse", ""] = ""  # "" within the spread, or neither

    @property
    def figure(self) -> str:
        return f"{self.value} ± {self.spread}" if self.spread else self.value

    def __str__(self) -> str:
        return f"{self.figure} ({self.change})" if self.change else self.figure


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
    ),
    Column(
        "fd",
        "FD",
        "Fréchet distance of the samples to held-out images, in the features named",
        _fixed("fd", 2),
        same=_FD,
    ),
    Column(
        "psnr_db",
        "PSNR to dense",
        "likeness of each image to the dense model's from the same noise, median, in dB",
        lambda figures, base: f"{figures.psnr_db:.1f} dB",
        better="higher",
        same=_FD,
    ),
    Column("params", "parameters", "weights and biases of the denoiser", _count("params")),
    Column("nonzero", "non-zero", "parameters that are not zero", _count("nonzero")),
    Column(
        "macs",
        "MACs",
        "multiply-accumulates of one image through the denoiser once, attention included",
        _count("macs"),
    ),
    Column("bytes_disk", "disk", "bytes of the model's folder", _count("bytes_disk", unit="B")),
    Column(
        "bytes_packed",
        "packed (fp16)",
        "bytes in half precision; layers with N:M masks as their kept values and one bit a weight",
        _count("bytes_packed", unit="B"),
    ),
    Column(
        "latency_ms",
        "latency ms",
        "one denoiser call: median ± half the distance between the quartiles",
        _fixed("latency_ms", 2),
        spread="latency_spread_ms",
        same=("device", "dtype", "latency_batch"),
    ),
    Column(
        "nm_valid",
        "N:M",
        "share of groups of M weights with at most N that are not zero, over the masked layers",
        _validity,
        better="",
    ),
)


def headers(evaluations: Sequence[Evaluation]) -> list[str]:
    """The names over `rows`; the FD's says in which features it was measured."""
    return ["model", *(header(column, evaluations) for column in COLUMNS)]


def header(column: Column, evaluations: Sequence[Evaluation]) -> str:
    features = {e.conditions.features for e in evaluations}
    return features.pop() if column.key == "fd" and len(features) == 1 else column.header


def cell(column: Column, evaluation: Evaluation, dense: Evaluation) -> Cell:
    """One figure of one model; the change to `dense` where the two are comparable."""
    value, base = _value(column, evaluation), _value(column, dense)
    if value is None:
        return Cell(NONE)
    text = column.text(evaluation.figures, value if base is None else base)
    if column.key == "fd" and evaluation.conditions.features != dense.conditions.features:
        text += f" {evaluation.conditions.features}"
    spread = _spread(column, evaluation)
    alone = evaluation is dense or not column.better
    if base is None or alone or not comparable(column, evaluation, dense):
        return Cell(text, _spread_text(spread, column))
    change = change_in_words(value, base)
    noise = (spread or 0) + (_spread(column, dense) or 0)
    tone = _tone(column, value - base, noise) if change else ""
    return Cell(text, _spread_text(spread, column), change, tone)


def rows(evaluations: Sequence[Evaluation]) -> list[list[str]]:
    """The table's text: one row a model, its label first; the first model is the dense one."""
    return [[e.label, *map(str, line)] for e, line in lines(evaluations)]


def change_in_words(value: float, base: float) -> str:
    """The change from `base`: "−30 %", "+2.1 %", "×12"; "" where it has no meaning."""
    if not (math.isfinite(value) and math.isfinite(base)) or base <= 0:
        return ""
    percent = 100 * (value / base - 1)
    if percent >= 900:
        return f"×{value / base:.0f}"
    digits = 0 if abs(percent) >= 9.95 else 1
    text = f"{abs(percent):.{digits}f} %"
    if float(text[:-2]) == 0:
        return "±0 %"
    return ("+" if percent > 0 else "−") + text


def comparable(column: Column, one: Evaluation, other: Evaluation) -> bool:
    """Whether the conditions that decide this figure are the same."""
    return all(getattr(one.conditions, k) == getattr(other.conditions, k) for k in column.same)


def warnings(evaluations: Sequence[Evaluation]) -> list[str]:
    """One line for every condition that is not the first model's: such figures do not compare."""
    return [
        f"{e.label}: {name} is {value}, not {getattr(evaluations[0].conditions, name)} as for "
        f"{evaluations[0].label}; figures that depend on it do not compare"
        for e in evaluations[1:]
        for name, value in e.conditions
        if value != getattr(evaluations[0].conditions, name)
    ]


def markdown_table(evaluations: Sequence[Evaluation]) -> str:
    lines = [headers(evaluations), *rows(evaluations)]
    ruler = ["---", *("---:" for _ in COLUMNS)]
    escaped = [[_markdown(text) for text in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in [escaped[0], ruler, *escaped[1:]]) + "\n"


def csv_text(evaluations: Sequence[Evaluation]) -> str:
    """Every figure and condition as it was measured, one row a model; empty where not measured."""
    names = ["label", "model", "hash", *Figures.model_fields, *Conditions.model_fields]
    out = io.StringIO()
    writer = csv.DictWriter(out, names, lineterminator="\n")
    writer.writeheader()
    for e in evaluations:
        figures = e.figures.model_dump() | {
            "nm_dense": json.dumps(e.figures.nm_dense, ensure_ascii=False)
        }
        identity = {"label": e.label, "model": e.model, "hash": e.hash}
        writer.writerow(identity | figures | e.conditions.model_dump())
    return out.getvalue()


def lines(evaluations: Sequence[Evaluation]) -> list[tuple[Evaluation, list[Cell]]]:
    return [(e, [cell(column, e, evaluations[0]) for column in COLUMNS]) for e in evaluations]


def _value(column: Column, evaluation: Evaluation) -> float | None:
    value: float | None = getattr(evaluation.figures, column.key)
    return value


def _spread(column: Column, evaluation: Evaluation) -> float | None:
    spread = getattr(evaluation.figures, column.spread) if column.spread else None
    return spread if spread is not None and math.isfinite(spread) else None


def _spread_text(spread: float | None, column: Column) -> str:
    if spread is None:
        return ""
    text = f"{spread:.{4 if column.key == 'loss' else 2}f}"
    return text if float(text) else f"{spread:.0e}"


def _tone(column: Column, change: float, noise: float) -> Literal["better", "worse", ""]:
    if abs(change) <= noise:
        return ""
    return "better" if (change < 0) == (column.better == "lower") else "worse"


def _markdown(text: str) -> str:
    return html.escape(text, quote=False).replace("|", "\\|").replace("\n", " ")
