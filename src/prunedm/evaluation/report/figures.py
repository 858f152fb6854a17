"""The table of figures and its headline, with the names of figures in both languages."""

import re
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup, escape

from prunedm.evaluation import table
from prunedm.evaluation.metric import Metric
from prunedm.evaluation.paired import IDENTICAL
from prunedm.evaluation.report.words import text, translated
from prunedm.evaluation.results import Evaluation
from prunedm.evaluation.table import Cell
from prunedm.tables import METRICS

_KEY_FIGURES = ("params", "bytes_packed", "macs", "fd", "loss")
_VALIDITY = re.compile(r"(?P<share>\S+ %) of (?P<pattern>.+) in (?P<layers>\d+) layers?")


def key_figures(evaluations: Sequence[Evaluation]) -> list[dict[str, Any]]:
    """The headline: four figures of the last model, with their change to dense."""
    dense, last = evaluations[0], evaluations[-1]
    tiles = []
    for column in map(METRICS.__getitem__, _KEY_FIGURES):
        now, before = (str(table.cell(column, e, e).figure) for e in (last, dense))
        shown = table.cell(column, last, dense)
        if now != table.NONE:
            story = f"{before} → {shown.figure}" if shown.change else ""
            tiles.append(
                {
                    "name": header(column, evaluations),
                    "big": shown.change or shown.value,
                    "story": story or (f"± {shown.spread}" if shown.spread else ""),
                    "tone": shown.tone,
                }
            )
    return tiles[:4]


def rows(evaluations: Sequence[Evaluation]) -> list[tuple[Evaluation, list[tuple[Markup, Cell]]]]:
    """The measured columns: each cell's figure as it is written, and the cell for its change."""
    columns, lines = table.measured(evaluations), []
    for e in evaluations:
        cells = [table.cell(column, e, evaluations[0]) for column in columns]
        lines.append((e, [(_figure(cell), cell) for cell in cells]))
    return lines


def _figure(cell: Cell) -> Markup:
    if cell.value == table.FAILED:
        return text("made.failed")
    if cell.value == IDENTICAL:
        return text("figures.identical")
    found = _VALIDITY.fullmatch(cell.value)
    if not found:
        return escape(cell.figure)
    layers = found["layers"]
    small = Markup("<small>{}</small>").format(
        text("nm.one" if layers == "1" else "nm.many", layers=layers)
    )
    return text("nm.share", share=found["share"], pattern=found["pattern"]) + " " + small


def warnings(evaluations: Sequence[Evaluation]) -> list[Markup]:
    """One line for every condition that is not the first model's, of figures that both have."""
    dense = evaluations[0].label
    return [
        text(
            "differs",
            label=label,
            name=translated(f"condition.{name}", name),
            value=value,
            expected=expected,
            dense=dense,
        )
        for label, name, value, expected in table.differences(evaluations)
    ]


def header(column: Metric, evaluations: Sequence[Evaluation]) -> Markup:
    """The table's name of a figure; where it names the features, it is one in both languages."""
    english = table.header(column, evaluations)
    own = english == column.header
    return translated(f"metric.{column.key}", english) if own else escape(english)


def meaning(column: Metric) -> Markup:
    words = translated(f"metric.{column.key}.meaning", column.meaning)
    return words + text(column.better) if column.better else words
