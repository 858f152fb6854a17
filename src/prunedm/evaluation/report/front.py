"""Quality against cost as inline SVG: every model a labelled point, and the Pareto front."""

import math
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup

from prunedm.evaluation import table
from prunedm.evaluation.metric import Metric, amount
from prunedm.evaluation.pictures import round_ticks
from prunedm.evaluation.report.words import attribute, text
from prunedm.evaluation.results import Evaluation
from prunedm.tables import METRICS

COSTS = ("latency_ms", "bytes_packed", "macs")
_WIDTH, _HEIGHT = 340, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 328, 14, 220
_LETTER, _LINE = 6.0, 12.0  # size of a letter in labels
_LONGEST = 22  # letters of a label; the rest is in its tooltip
_Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True)
class ModelPoint:
    """A model: both less is better."""

    label: str
    cost: float
    quality: float
    words: str  # both, as the table has them
    dense: bool = False


def panels(evaluations: Sequence[Evaluation], quality_words: Markup) -> list[tuple[Markup, Markup]]:
    """Title and SVG of each cost that at least two models have."""
    quality, drawn = table.quality(evaluations), []
    for column in map(METRICS.__getitem__, COSTS):
        points = _points(evaluations, quality, column)
        if len(points) > 1:
            largest = max(p.cost for p in points)
            svg = _panel(points, _cost_text(column.key, largest), quality_words)
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


def _cost_text(key: str, largest: float) -> Callable[[float], str]:
    if key == "latency_ms":
        return lambda value: f"{value:g}"
    unit = "B" if key == "bytes_packed" else ""
    return lambda value: _short(amount(value, largest, unit=unit))


def _short(words: str) -> str:
    """Without zeros after the point: "2.00 MB" as "2 MB"."""
    number = words.rstrip("BkMGT ")
    return (number.rstrip("0").rstrip(".") if "." in number else number) + words[len(number) :]


@dataclass(frozen=True)
class _Scale:
    """Values to places on the page; logarithmic where they span more than a factor of five."""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool

    @classmethod
    def over(cls, values: Sequence[float], start: float, end: float) -> "_Scale":
        low, high = min(values), max(values)
        if low > 0 and high > 5 * low:
            margin = (high / low) ** 0.12
            return cls(low / margin, high * margin, start, end, True)
        margin = 0.12 * (high - low) or 0.1 * high or 1.0
        return cls(max(0.0, low - margin), high + margin, start, end, False)

    def __call__(self, value: float) -> float:
        low, high, at = (math.log(v) if self.logarithmic else v for v in (*self.ends, value))
        return self.start + (at - low) / (high - low) * (self.end - self.start)

    @property
    def ends(self) -> tuple[float, float]:
        return self.low, self.high

    def ticks(self) -> list[float]:
        if not self.logarithmic:
            return round_ticks(*self.ends, about=4)
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)))
        steps = (1, 2, 5) if self.high < 300 * self.low else (1,)
        ticks = [step * 10.0**power for power in powers for step in steps]
        return [tick for tick in ticks if self.low <= tick <= self.high]


def _panel(
    points: Sequence[ModelPoint], cost_text: Callable[[float], str], quality_words: Markup
) -> Markup:
    x = _Scale.over([p.cost for p in points], _LEFT, _RIGHT)
    y = _Scale.over([p.quality for p in points], _BOTTOM, _TOP)
    parts = [_quality_tick(tick, y(tick)) for tick in y.ticks()]
    parts += [_cost_tick(cost_text(tick), x(tick)) for tick in x.ticks()]
    front = [points[k] for k in table.pareto([(p.cost, p.quality) for p in points])]
    parts.append(_stairs([(x(p.cost), y(p.quality)) for p in front]))
    boxes = [_around(x(p.cost), y(p.quality)) for p in points]
    boxes += [(x(a.cost), y(a.quality), x(b.cost), y(a.quality)) for a, b in pairwise(front)]
    boxes += [(x(b.cost), y(a.quality), x(b.cost), y(b.quality)) for a, b in pairwise(front)]
    boxes += [(x(p.cost), y(p.quality), _RIGHT, y(p.quality)) for p in front[-1:]]
    for p in points:
        parts.append(_dot(p, x(p.cost), y(p.quality), on_front=p in front, boxes=boxes))
    name = attribute("aria-label", "front.alt", quality=quality_words)
    return Markup('<svg class="front" viewBox="0 0 {} {}" role="img" {}>{}</svg>').format(
        _WIDTH, _HEIGHT, name, Markup("").join(parts)
    )


def _quality_tick(value: float, y: float) -> Markup:
    return Markup(
        '<line class="axis" x1="{}" x2="{}" y1="{y}" y2="{y}"/>'
        '<text x="{}" y="{}" text-anchor="end">{}</text>'
    ).format(_LEFT, _RIGHT, _LEFT - 7, f"{y + 3.6:.1f}", f"{value:.4g}", y=f"{y:.1f}")


def _cost_tick(words: str, x: float) -> Markup:
    anchor = "end" if x > _RIGHT - 16 else "middle"
    return Markup('<text x="{}" y="{}" text-anchor="{}">{}</text>').format(
        f"{x:.1f}", _HEIGHT - 10, anchor, words
    )


def _stairs(places: Sequence[tuple[float, float]]) -> Markup:
    """Along the front no model is better: level to the next point's cost, then down to it."""
    (first, top), (_, last) = places[0], places[-1]
    line = [(first, float(_TOP)), (first, top)]
    for u, v in places[1:]:
        line += [(u, line[-1][1]), (u, v)]
    line.append((float(_RIGHT), last))
    path = " ".join(f"{u:.1f},{v:.1f}" for u, v in line)
    return Markup('<polyline class="front" points="{}"/>').format(path)


def _dot(point: ModelPoint, u: float, v: float, *, on_front: bool, boxes: list[_Box]) -> Markup:
    label = point.label if len(point.label) <= _LONGEST else point.label[: _LONGEST - 1] + "…"
    left, base, box = _place(label, u, v, boxes, below=on_front)
    boxes.append(box)
    kind = " ".join(["model"] + ["first"] * point.dense + ["best"] * on_front)
    return Markup(
        '<g><title>{}: {}</title><circle class="{}" cx="{}" cy="{}" r="4"/>'
        '<text class="label" x="{}" y="{}">{}</text></g>'
    ).format(
        point.label, point.words, kind, f"{u:.1f}", f"{v:.1f}", f"{left:.1f}", f"{base:.1f}", label
    )


def _place(
    label: str, u: float, v: float, boxes: Sequence[_Box], *, below: bool
) -> tuple[float, float, _Box]:
    """Left end and baseline of a label near (u, v), where it covers no other if there is room."""
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


def _around(u: float, v: float) -> _Box:
    return u - 5, v - 5, u + 5, v + 5


def _meet(one: _Box, other: _Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
