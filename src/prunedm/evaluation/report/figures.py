"""The table of figures and its headline, with the names of figures in both languages."""

import re
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup, escape

from prunedm.evaluation import table
from prunedm.evaluation.metric import Metric
from prunedm.evaluation.paired import IDENTICAL
from prunedm.evaluation.report.words import Words, text, translated
from prunedm.evaluation.results import Evaluation
from prunedm.evaluation.table import Cell
from prunedm.tables import METRICS

_KEY_FIGURES = ("params", "bytes_packed", "macs", "fd", "loss")
_VALIDITY = re.compile(r"(?P<share>\S+ %) of (?P<pattern>.+) in (?P<layers>\d+) layers?")


def key_figures(evaluations: Sequence[Evaluation]) -> list[dict[str, Any]]:
    """The headline: up to four figures of the last model, with their change to dense."""
    dense, last = evaluations[0], evaluations[-1]
    tiles = []
    for column in map(METRICS.__getitem__, _KEY_FIGURES):
        now, before = (table.cell(column, e, e).figure for e in (last, dense))
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
    """The measured columns: each figure in both languages, and its cell for the change."""
    return [
        (e, [(_figure(cell), cell) for cell in cells])
        for e, cells in table.lines(evaluations, table.measured(evaluations))
    ]


def _figure(cell: Cell) -> Markup:
    if cell.value == table.FAILED:
        return text("made.failed")
    if cell.value == IDENTICAL:
        return text("figures.identical")
    found = _VALIDITY.fullmatch(cell.value)
    if not found:
        return escape(cell.figure)
    layers = text("nm.one" if found["layers"] == "1" else "nm.many", layers=found["layers"])
    share = text("nm.share", share=found["share"], pattern=found["pattern"])
    return Markup("{} <small>{}</small>").format(share, layers)


def warnings(evaluations: Sequence[Evaluation]) -> list[Words]:
    """A line for each of `table.differences`."""
    return [
        text(
            "differs",
            label=label,
            name=translated(f"condition.{name}", name),
            value=value,
            expected=expected,
            dense=evaluations[0].label,
        )
        for label, name, value, expected in table.differences(evaluations)
    ]


def header(column: Metric, evaluations: Sequence[Evaluation]) -> Words:
    """The table's name of a figure; one that names the features is the same in both languages."""
    english = table.header(column, evaluations)
    return translated(f"metric.{column.key}" if english == column.header else "", english)


def meaning(column: Metric) -> Markup:
    words = translated(f"metric.{column.key}.meaning", column.meaning)
    return words + text(column.better) if column.better else words
