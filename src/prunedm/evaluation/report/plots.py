"""Inline SVG: the losses of every training, and quality against cost with the Pareto front.

Shapes carry classes, so that the page's style chooses their colours, in light and dark.
"""

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from markupsafe import Markup

from prunedm.evaluation import table
from prunedm.evaluation.metric import Metric
from prunedm.evaluation.report.words import Words, attribute, text
from prunedm.evaluation.results import Evaluation
from prunedm.tables import METRICS

COSTS = ("latency_ms", "bytes_packed", "macs")
SMOOTHED = 100  # points of a smoothed curve, about
_WIDTH, _HEIGHT = 340, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 329, 13, 201
_LETTER = 6.0  # width of a letter in labels
_LONGEST = 22  # letters of a label; the tooltip has the whole
Point = tuple[float, float]
_Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True)
class Scale:
    """Maps values to positions on the page; logarithmic for a range of more than a factor of four."""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    @classmethod
    def over(cls, values: Sequence[float], start: float, end: float) -> "Scale":
        """With a margin around the values; not below zero where none of them is."""
        low, high = min(values), max(values)
        if low > 0 and high > 4 * low:
            margin = (high / low) ** 0.1
            return cls(low / margin, high * margin, start, end, True)
        margin = 0.1 * (high - low) or 0.1 * abs(high) or 1.0
        return cls(max(0.0, low - margin) if low >= 0 else low - margin, high + margin, start, end)

    def __call__(self, value: float) -> float:
        ends = self.low, self.high, value
        low, high, at = map(math.log, ends) if self.logarithmic else ends
        return self.start + (at - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round values: a few, or 1, 2 and 5 times powers of ten (powers alone for a long range)."""
        if not self.logarithmic:
            return round_ticks(self.low, self.high)
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        steps = (1, 2, 5) if self.high < 300 * self.low else (1,)
        ticks = [step * 10.0**power for power in powers for step in steps]
        return [tick for tick in ticks if self.low <= tick <= self.high]


def round_ticks(low: float, high: float, *, about: int = 4) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) between `low` and `high`."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(k * step, 12) for k in range(first, last + 1)]


# ------------------------------------------------------------------------------ loss curves


@dataclass(frozen=True)
class Curve:
    """The training of one stage: smoothed training losses and held-out losses by step."""

    name: str
    training: list[Point] = field(default_factory=list)
    held_out: list[Point] = field(default_factory=list)

    @property
    def losses(self) -> list[float]:
        return [loss for _, loss in self.training + self.held_out if math.isfinite(loss)]


def curve_of(
    name: str,
    losses: Sequence[float | None],
    held_out: Sequence[Sequence[float | None]] = (),
) -> Curve:
    """Means of neighbouring losses, to leave about `SMOOTHED` points; None stands for NaN."""
    window = max(1, len(losses) // SMOOTHED)
    losses_N = np.array(losses, dtype=np.float64)  # None becomes NaN
    starts = range(0, len(losses) - window + 1, window)
    training = [(k + (window + 1) / 2, float(np.mean(losses_N[k : k + window]))) for k in starts]
    points = [(float(p[0]), float(p[1])) for p in np.array(held_out, dtype=np.float64)]
    return Curve(name, training, points)


def loss_curves(curves: Sequence[Curve], *, dense: float | None = None) -> list[Markup]:
    """One SVG per curve, all on one loss axis, with `dense` as a dashed line across.

    A curve without finite losses gives "".
    """
    dense = dense if dense is not None and math.isfinite(dense) else None
    values = [loss for curve in curves for loss in curve.losses]
    values += [] if dense is None else [dense]
    if not values:
        return [Markup("") for _ in curves]
    y = Scale.over(values, _BOTTOM, _TOP)
    return [_curve_panel(curve, y, dense) if curve.losses else Markup("") for curve in curves]


def _curve_panel(curve: Curve, y: Scale, dense: float | None) -> Markup:
    last = max(1.0, *(step for step, _ in curve.training + curve.held_out))
    x = Scale(0, last, _LEFT, _RIGHT)
    steps = {tick: f"{tick:,.0f}".replace(",", "\u2009") for tick in x.ticks()}  # thin spaces
    parts = [*_ticks_beside(y), *_ticks_below(x, steps)]
    if dense is not None:
        parts.append(_line("dense", [(_LEFT, y(dense)), (_RIGHT, y(dense))]))
    for kind, points in (("training", curve.training), ("held-out", curve.held_out)):
        drawn = [(x(step), y(loss)) for step, loss in points if math.isfinite(loss)]
        parts.append(_line(kind, drawn))
        if kind == "held-out":
            circle = Markup('<circle class="held-out" cx="{:.1f}" cy="{:.1f}" r="2.4"/>')
            parts += [circle.format(u, v) for u, v in drawn]
    return _svg("curve", Markup('aria-label="losses"'), parts)


# --------------------------------------------------------------------- quality against cost


@dataclass(frozen=True)
class ModelPoint:
    """A model; lower is better in both."""

    label: str
    cost: float
    quality: float
    words: str  # both, as the table has them
    dense: bool = False


def panels(evaluations: Sequence[Evaluation], quality_words: Words) -> list[tuple[Words, Markup]]:
    """Title and SVG of each cost that at least two models have."""
    quality, drawn = table.quality(evaluations), []
    for column in map(METRICS.__getitem__, COSTS):
        points = _points(evaluations, quality, column)
        if len(points) > 1:
            svg = _front_panel(points, column, quality_words)
            drawn.append((text(f"front.{column.key}"), svg))
    return drawn


def _points(evaluations: Sequence[Evaluation], quality: Metric, cost: Metric) -> list[ModelPoint]:
    dense, points = evaluations[0], []
    for e in evaluations:
        values = getattr(e.figures, cost.key), getattr(e.figures, quality.key)
        same = all(table.comparable(column, e, dense) for column in (cost, quality))
        if same and all(v is not None and math.isfinite(v) and v >= 0 for v in values):
            words = " · ".join(f"{c.header} {table.cell(c, e, e).figure}" for c in (quality, cost))
            points.append(ModelPoint(e.label, *values, words, e is dense))
    return points


def _short(words: str) -> str:
    """Without trailing zeros after the point: "2.00 MB" as "2 MB"."""
    number = words.rstrip("BkMGT ")
    return (number.rstrip("0").rstrip(".") if "." in number else number) + words[len(number) :]


def _front_panel(points: Sequence[ModelPoint], cost: Metric, quality_words: Words) -> Markup:
    x = Scale.over([p.cost for p in points], _LEFT, _RIGHT)
    y = Scale.over([p.quality for p in points], _BOTTOM, _TOP)
    front = [points[k] for k in table.pareto([(p.cost, p.quality) for p in points])]
    stairs = _stairs([(x(p.cost), y(p.quality)) for p in front])
    largest = max(p.cost for p in points)
    costs = {tick: _short(cost.text(tick, largest)) for tick in x.ticks()}
    parts = [*_ticks_beside(y), *_ticks_below(x, costs)]
    parts.append(_line("front", stairs))
    # labels keep off the points and off the line
    boxes = [(x(p.cost) - 5, y(p.quality) - 5, x(p.cost) + 5, y(p.quality) + 5) for p in points]
    boxes += [
        (min(a[0], b[0]), min(a[1], b[1]), max(a[0], b[0]), max(a[1], b[1]))
        for a, b in pairwise(stairs[1:])
    ]
    for p in points:
        parts.append(_dot(p, x(p.cost), y(p.quality), on_front=p in front, boxes=boxes))
    return _svg("front", attribute("aria-label", "front.alt", quality=quality_words), parts)


def _stairs(places: Sequence[Point]) -> list[Point]:
    """The edge of what the front beats: level to the next point's cost, then down to it."""
    line = [(places[0][0], float(_TOP)), places[0]]
    for u, v in places[1:]:
        line += [(u, line[-1][1]), (u, v)]
    return [*line, (float(_RIGHT), places[-1][1])]


def _dot(point: ModelPoint, u: float, v: float, *, on_front: bool, boxes: list[_Box]) -> Markup:
    label = point.label if len(point.label) <= _LONGEST else point.label[: _LONGEST - 1] + "…"
    left, base, box = _place(label, u, v, boxes, below=on_front)
    boxes.append(box)
    kind = " ".join(["model"] + ["first"] * point.dense + ["best"] * on_front)
    return Markup(
        '<g><title>{}: {}</title><circle class="{}" cx="{:.1f}" cy="{:.1f}" r="4"/>'
        '<text class="label" x="{:.1f}" y="{:.1f}">{}</text></g>'
    ).format(point.label, point.words, kind, u, v, left, base, label)


def _place(
    label: str, u: float, v: float, boxes: Sequence[_Box], *, below: bool
) -> tuple[float, float, _Box]:
    """Left end and baseline of a label near (u, v) that covers as few boxes as possible."""
    length = _LETTER * sum(1 + (unicodedata.east_asian_width(c) in "WF") for c in label)
    tries = []
    first = 14 if below else -14  # below a point of the front there is no other
    for down in (0, first, -first, 2 * first, -2 * first, 3 * first, -3 * first):
        for left in (u + 8, u - 8 - length, u - length / 2):
            if down or left != u - length / 2:
                inside = min(max(left, _LEFT + 2), max(_LEFT + 2, _RIGHT - length))
                base = v + 3.6 + down
                tries.append((inside, base, (inside, base - 9, inside + length, base + 3)))
    covered = [
        sum(_meet(box, other) for other in boxes) + 5 * (box[1] < 0 or box[3] > _BOTTOM)
        for _, _, box in tries
    ]
    return tries[covered.index(min(covered))]


def _meet(one: _Box, other: _Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


# ------------------------------------------------------------------------------------ parts


def _svg(kind: str, name: Markup, parts: Sequence[Markup]) -> Markup:
    return Markup('<svg class="{}" viewBox="0 0 {} {}" role="img" {}>{}</svg>').format(
        kind, _WIDTH, _HEIGHT, name, Markup("").join(parts)
    )


def _line(kind: str, points: Sequence[Point]) -> Markup:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    line = Markup('<polyline class="{}" points="{}"/>').format(kind, path)
    return line if len(points) > 1 else Markup("")


def _ticks_beside(scale: Scale) -> list[Markup]:
    """A line across and its value for every tick of a vertical scale."""
    label = Markup('<text x="{}" y="{:.1f}" text-anchor="end">{:.4g}</text>')
    return [
        _line("axis", [(_LEFT, scale(tick)), (_RIGHT, scale(tick))])
        + label.format(_LEFT - 7, scale(tick) + 3.6, tick)
        for tick in scale.ticks()
    ]


def _ticks_below(scale: Scale, words: dict[float, str]) -> list[Markup]:
    label = Markup('<text x="{:.1f}" y="{}" text-anchor="{}">{}</text>')
    return [
        label.format(x, _HEIGHT - 10, "end" if x > _RIGHT - 14 else "middle", word)
        for x, word in ((scale(tick), word) for tick, word in words.items())
    ]
