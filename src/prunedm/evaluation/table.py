"""The table of results, as the terminal, Markdown, CSV and the report show it."""

import csv
import html
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from prunedm.evaluation.metric import Metric
from prunedm.evaluation.results import Change, Conditions, Evaluation, Figures, figure_names
from prunedm.evaluation.tasks import task_metrics
from prunedm.tables import METRICS

NONE = "–"
FAILED = "failed"
Tone = Literal["better", "worse", ""]


@dataclass(frozen=True)
class Cell:
    """A figure as text: its value, ± its spread, and the change to dense."""

    value: str
    spread: str = ""
    change: str = ""
    tone: Tone = ""

    @property
    def figure(self) -> str:
        return f"{self.value} ± {self.spread}" if self.spread else self.value

    def __str__(self) -> str:
        return f"{self.figure} ({self.change})" if self.change else self.figure


def headers(
    evaluations: Sequence[Evaluation], columns: Sequence[Metric] | None = None
) -> list[str]:
    """The column headers of `rows`."""
    return ["model", *(header(column, evaluations) for column in _columns(columns))]


def header(column: Metric, evaluations: Sequence[Evaluation]) -> str:
    """A metric's header; FD's names the features it was measured in."""
    features = {e.conditions.features for e in evaluations}
    return column.named(features.pop() if len(features) == 1 else "") or column.header


def cell(column: Metric, evaluation: Evaluation, dense: Evaluation) -> Cell:
    """One figure of one model, with its change to `dense` where the two are comparable."""
    value, base = _value(column, evaluation), _value(column, dense)
    if failed(column, evaluation):
        return Cell(FAILED)
    if value is None:
        return Cell(column.instead(evaluation.figures) or NONE)
    text = column.text(value, value if base is None else base) + column.unit
    text += column.detail(evaluation.figures)
    features = evaluation.conditions.features
    if column.named(features) == features != dense.conditions.features:
        text += f" {features}"
    spread = _spread(column, evaluation)
    alone = evaluation is dense or not column.better
    if base is None or alone or not comparable(column, evaluation, dense):
        return Cell(text, _spread_text(spread, column))
    change = change_in_words(value, base)
    noise = (spread or 0) + (_spread(column, dense) or 0)
    tone = tone_of(value - base, noise, column.better) if change else ""
    return Cell(text, _spread_text(spread, column), change, tone)


def tone_of(change: float, noise: float, better: str = "lower") -> Tone:
    """Whether a change is for the better or the worse; "" up to `noise`."""
    if not abs(change) > noise:
        return ""
    return "better" if (change < 0) == (better == "lower") else "worse"


def failed(column: Metric, evaluation: Evaluation) -> bool:
    """Whether the figure is missing because a step failed."""
    return column.of in (
        "",
        evaluation.conditions.kind,
    ) and not evaluation.failed.keys().isdisjoint(column.steps)


def metrics(evaluations: Sequence[Evaluation]) -> list[Metric]:
    """All, and those of the tasks that these were asked."""
    return [*METRICS.values(), *task_metrics(name for e in evaluations for name, _ in e.figures)]


def measured(evaluations: Sequence[Evaluation]) -> list[Metric]:
    """The columns with an entry for at least one of these."""
    return [
        column
        for column in metrics(evaluations)
        if any(known(column, e) or failed(column, e) for e in evaluations)
    ]


def known(column: Metric, evaluation: Evaluation) -> bool:
    """Whether the figure was measured, even if the result is not a number."""
    return _value(column, evaluation) is not None or bool(column.instead(evaluation.figures))


def changes(evaluation: Evaluation, dense: Evaluation) -> dict[str, Change]:
    """By field of `Figures`: the changes of what both models have under equal conditions."""
    found = {}
    for column in metrics([evaluation]):
        value, base = _value(column, evaluation), _value(column, dense)
        broken = failed(column, evaluation) or failed(column, dense)
        if value is None or base is None or broken or not column.better:
            continue
        if comparable(column, evaluation, dense):
            relative = value / base - 1 if base > 0 else None
            found[column.key] = Change(absolute=value - base, relative=relative)
    return found


def rows(
    evaluations: Sequence[Evaluation], columns: Sequence[Metric] | None = None
) -> list[list[str]]:
    """The table's text: one row a model, its label first; the first model is the dense one."""
    return [[e.label, *map(str, line)] for e, line in lines(evaluations, columns)]


def change_in_words(value: float, base: float) -> str:
    """The change from `base`: "−30 %", "+2.1 %", "×12"; "" where it is undefined."""
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


def comparable(column: Metric, one: Evaluation, other: Evaluation) -> bool:
    """Whether the conditions that this figure depends on are the same."""
    return all(getattr(one.conditions, k) == getattr(other.conditions, k) for k in column.same)


def quality(evaluations: Sequence[Evaluation]) -> Metric:
    """FD where every model has it under the same conditions, else the loss."""
    fd, dense = METRICS["fd"], evaluations[0]
    whole = all(e.figures.fd is not None and comparable(fd, e, dense) for e in evaluations)
    return fd if whole else METRICS["loss"]


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the Pareto-optimal points (lower is better in both), by rising first value."""
    order = sorted(range(len(points)), key=lambda k: points[k])
    best, found = float("inf"), []
    for k in order:
        if points[k][1] < best:
            best = points[k][1]
            found.append(k)
    return found


def differences(evaluations: Sequence[Evaluation]) -> list[tuple[str, str, object, object]]:
    """Label, condition, its value and the first model's, where the two differ and it matters."""
    return [
        (e.label, name, value, getattr(evaluations[0].conditions, name))
        for e in evaluations[1:]
        for name, value in e.conditions
        if value != getattr(evaluations[0].conditions, name)
        and any(
            name in column.same and None not in (_value(column, e), _value(column, evaluations[0]))
            for column in metrics(evaluations)
        )
    ]


def warnings(evaluations: Sequence[Evaluation]) -> list[str]:
    """One line for each of `differences`."""
    return [
        f"{label}: {name} is {value}, not {expected} as for {evaluations[0].label}; figures that "
        "depend on it do not compare"
        for label, name, value, expected in differences(evaluations)
    ]


def markdown_table(evaluations: Sequence[Evaluation]) -> str:
    """Rows are models; figures that no model has are left out."""
    columns = measured(evaluations)
    return markdown(headers(evaluations, columns), rows(evaluations, columns)) + "\n"


def markdown(
    head: Sequence[str], body: Sequence[Sequence[object]], *, words: Sequence[str] = ()
) -> str:
    """A Markdown table; the first column and those of `words` are left-aligned, the others right."""
    ruler = ["---" if k == 0 or name in words else "---:" for k, name in enumerate(head)]
    escaped = [[_markdown(str(text)) for text in line] for line in (head, *body)]
    return "\n".join(f"| {' | '.join(line)} |" for line in [escaped[0], ruler, *escaped[1:]])


def csv_text(evaluations: Sequence[Evaluation]) -> str:
    """Every figure and condition unrounded, one row per model; empty where not measured."""
    own = ["label", "model", "hash", "reloads", "failed"]
    tasks = [name for m in metrics(evaluations)[len(METRICS) :] for name in m.fields]
    names = [*own, *figure_names(), *tasks, *Figures.model_fields, *Conditions.model_fields]
    out = io.StringIO()
    writer = csv.DictWriter(out, names, lineterminator="\n")
    writer.writeheader()
    for e in evaluations:
        fields = e.model_dump(include=set(own))
        fields |= e.figures.model_dump() | e.conditions.model_dump()
        writer.writerow({name: _plain(value) for name, value in fields.items()})
    return out.getvalue()


def lines(
    evaluations: Sequence[Evaluation], columns: Sequence[Metric] | None = None
) -> list[tuple[Evaluation, list[Cell]]]:
    dense, shown = evaluations[0], _columns(columns)
    return [(e, [cell(column, e, dense) for column in shown]) for e in evaluations]


def _columns(columns: Sequence[Metric] | None) -> list[Metric]:
    return list(METRICS.values() if columns is None else columns)


def _plain(value: object) -> object:
    """Lists and tables as JSON."""
    nested = isinstance(value, (dict, list))
    return json.dumps(value, ensure_ascii=False) if nested else value


def _value(column: Metric, evaluation: Evaluation) -> float | None:
    value: float | None = getattr(evaluation.figures, column.key)
    return value


def _spread(column: Metric, evaluation: Evaluation) -> float | None:
    spread = getattr(evaluation.figures, column.spread) if column.spread else None
    return spread if spread is not None and math.isfinite(spread) else None


def _spread_text(spread: float | None, column: Metric) -> str:
    if spread is None:
        return ""
    text = column.text(spread, spread)
    return text if float(text) else f"{spread:.0e}"


def _markdown(text: str) -> str:
    return html.escape(text, quote=False).replace("|", "\\|").replace("\n", " ")
