"""The table of figures and its headline, with the names of figures in both languages."""

import re
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup, escape

from prunedm.evaluation import table
from prunedm.evaluation.metric import Metric
from prunedm.evaluation.paired import IDENTICAL
from prunedm.evaluation.report import table_words
from prunedm.evaluation.report.words import both, text
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
    dense = evaluations[0]
    return [
        text(
            "differs",
            label=e.label,
            name=both(name, table_words.CONDITIONS.get(name, name)),
            value=value,
            expected=getattr(dense.conditions, name),
            dense=dense.label,
        )
        for e in evaluations[1:]
        for name, value in e.conditions
        if value != getattr(dense.conditions, name) and _matters(name, e, dense)
    ]


def _matters(condition: str, one: Evaluation, other: Evaluation) -> bool:
    columns = (column for column in METRICS.values() if condition in column.same)
    return any(None not in (figure(one, c.key), figure(other, c.key)) for c in columns)


def figure(e: Evaluation, key: str) -> float | None:
    value: float | None = getattr(e.figures, key)
    return value


def header(column: Metric, evaluations: Sequence[Evaluation]) -> Markup:
    """The table's name of a figure; where it names the features, it is one in both languages."""
    english = table.header(column, evaluations)
    chinese = table_words.COLUMNS.get(column.key, (english, ""))[0]
    return escape(english) if english != column.header else both(english, chinese)


def meaning(column: Metric) -> Markup:
    chinese = table_words.COLUMNS.get(column.key, ("", column.meaning))[1]
    words = both(column.meaning, chinese)
    if not column.better:
        return words
    return both(column.meaning + "; ", chinese + "；") + text(column.better)
