"""What is left of every layer: one bar a layer, and why some stayed dense."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from prunedm.evaluation.report.words import text, translated
from prunedm.evaluation.results import Evaluation, LayerSparsity

MANY = 30  # more layers than this are collapsed
_NO_MULTIPLE = re.compile(r"(?P<inputs>\d+) input channels are (?:no|not a) multiple of (?P<m>\d+)")


@dataclass(frozen=True)
class LayerBar:
    """One layer; `width` is its weights as a part of the largest layer's, both in %."""

    name: str
    shape: str
    width: float
    filled: float  # part of its weights that are not zero
    share: str  # `filled` as it is shown
    count: Markup
    pattern: str
    notes: list[Markup]


@dataclass(frozen=True)
class LayerBars:
    labels: list[str]  # models whose layers are the same share their bars
    summary: Markup
    collapsed: bool
    bars: list[LayerBar]


def layer_bars(evaluations: Sequence[Evaluation]) -> list[LayerBars]:
    """The bars of every model that has layers; all on one scale of weights."""
    groups: dict[str, tuple[list[str], list[LayerSparsity]]] = {}
    for e in evaluations:
        if e.layers:
            key = json.dumps([layer.model_dump() for layer in e.layers])
            groups.setdefault(key, ([], e.layers))[0].append(e.label)
    largest = max((x.weights for _, layers in groups.values() for x in layers), default=0)
    return [_bars(labels, layers, largest) for labels, layers in groups.values()]


def left_dense(evaluations: Sequence[Evaluation]) -> list[tuple[str, dict[Markup, list[str]]]]:
    """Labels, then reason -> layers, of models without bars; those that agree share an entry."""
    groups: dict[str, tuple[Evaluation, list[str]]] = {}
    for e in evaluations:
        if e.figures.nm_dense and not e.layers:
            key = json.dumps(e.figures.nm_dense, sort_keys=True)
            groups.setdefault(key, (e, []))[1].append(e.label)
    return [(", ".join(labels), _by_reason(e.figures.nm_dense)) for e, labels in groups.values()]


def reason_in_words(reason: str) -> Markup:
    """Why a layer stayed dense: in both languages where the reason is one of prunedm's own."""
    found = _NO_MULTIPLE.fullmatch(reason)
    if found:
        return text("reason.multiple", **found.groupdict())
    return translated(f"reason.{reason}", reason)


def _bars(labels: list[str], layers: Sequence[LayerSparsity], largest: int) -> LayerBars:
    weights, nonzero = sum(x.weights for x in layers), sum(x.nonzero for x in layers)
    masked = sum(bool(x.pattern) for x in layers)
    share = _percent(nonzero, weights)
    summary = text("layers.summary", count=len(layers), masked=masked, share=share)
    return LayerBars(labels, summary, len(layers) > MANY, [_bar(x, largest) for x in layers])


def _bar(layer: LayerSparsity, largest: int) -> LayerBar:
    notes = []
    if layer.valid is not None and layer.valid < 1:
        notes.append(text("layers.valid", share=f"{layer.valid:.1%}".replace("%", " %")))
    if layer.why_dense:
        notes.append(text("layers.dense", reason=reason_in_words(layer.why_dense)))
    numbers = {"nonzero": f"{layer.nonzero:,}", "weights": f"{layer.weights:,}"}
    return LayerBar(
        name=layer.name,
        shape=" × ".join(map(str, layer.shape)),
        width=100 * layer.weights / max(largest, 1),
        filled=100 * layer.nonzero / max(layer.weights, 1),
        share=_percent(layer.nonzero, layer.weights),
        count=text("layers.nonzero", **numbers),
        pattern=layer.pattern,
        notes=notes,
    )


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / max(whole, 1):.3g} %"


def _by_reason(layers: Mapping[str, str]) -> dict[Markup, list[str]]:
    reasons: dict[Markup, list[str]] = {}
    for layer, reason in layers.items():
        reasons.setdefault(reason_in_words(reason), []).append(layer)
    return reasons
