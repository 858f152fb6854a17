"""The weights left in every layer, one bar a layer, and why some layers stayed dense."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from prunedm.evaluation.report.words import Words, text, translated
from prunedm.evaluation.results import Evaluation, LayerFigures

MANY = 30  # more layers than this are collapsed
_NOT_MULTIPLE = re.compile(r"(?P<inputs>\d+) input channels are (no|not a) multiple of (?P<m>\d+)")


@dataclass(frozen=True)
class LayerBar:
    """One layer; `width` is its weights in % of the largest layer's."""

    layer: LayerFigures
    width: float
    filled: float  # % of its weights that are not zero
    share: str  # `filled` as text
    count: Words
    notes: list[Words]


@dataclass(frozen=True)
class LayerBars:
    labels: list[str]  # models with equal layers share their bars
    summary: Words
    collapsed: bool
    bars: list[LayerBar]


def layer_bars(evaluations: Sequence[Evaluation]) -> list[LayerBars]:
    """The bars of every model that has layers; all on one scale of weights."""
    groups: dict[str, tuple[list[str], list[LayerFigures]]] = {}
    for e in evaluations:
        if e.layers:
            key = json.dumps([layer.model_dump() for layer in e.layers])
            groups.setdefault(key, ([], e.layers))[0].append(e.label)
    largest = max((x.weights for _, layers in groups.values() for x in layers), default=0)
    return [_bars(labels, layers, largest) for labels, layers in groups.values()]


def left_dense(evaluations: Sequence[Evaluation]) -> list[tuple[str, dict[Words, list[str]]]]:
    """Labels, then reason -> layers, for models without bars; equal ones share an entry."""
    groups: dict[str, tuple[list[str], dict[Words, list[str]]]] = {}
    for e in evaluations:
        if e.figures.nm_dense and not e.layers:
            reasons: dict[Words, list[str]] = {}
            for layer, reason in e.figures.nm_dense.items():
                reasons.setdefault(reason_in_words(reason), []).append(layer)
            key = json.dumps(e.figures.nm_dense, sort_keys=True)
            groups.setdefault(key, ([], reasons))[0].append(e.label)
    return [(", ".join(labels), reasons) for labels, reasons in groups.values()]


def reason_in_words(reason: str) -> Words:
    """Why a layer stayed dense; in both languages where the reason is one of prunedm's own."""
    found = _NOT_MULTIPLE.fullmatch(reason)
    if found:
        return translated("reason.multiple", reason, **found.groupdict())
    return translated(f"reason.{reason}", reason)


def _bars(labels: list[str], layers: Sequence[LayerFigures], largest: int) -> LayerBars:
    weights, nonzero = sum(x.weights for x in layers), sum(x.nonzero for x in layers)
    masked = sum(bool(x.pattern) for x in layers)
    share = _percent(nonzero, weights)
    summary = text("layers.summary", count=len(layers), masked=masked, share=share)
    return LayerBars(labels, summary, len(layers) > MANY, [_bar(x, largest) for x in layers])


def _bar(layer: LayerFigures, largest: int) -> LayerBar:
    notes = []
    if layer.valid is not None and layer.valid < 1:
        notes.append(text("layers.valid", share=f"{100 * layer.valid:.1f} %"))
    if layer.why_dense:
        notes.append(text("layers.dense", reason=reason_in_words(layer.why_dense)))
    return LayerBar(
        layer=layer,
        width=100 * layer.weights / max(largest, 1),
        filled=100 * layer.nonzero / max(layer.weights, 1),
        share=_percent(layer.nonzero, layer.weights),
        count=text("layers.nonzero", nonzero=f"{layer.nonzero:,}", weights=f"{layer.weights:,}"),
        notes=notes,
    )


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / max(whole, 1):.3g} %"
