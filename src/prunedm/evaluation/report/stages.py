"""How the models were made: every stage once, with its record and its share of the time."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup, escape

from prunedm.evaluation.report.words import Words, text, translated
from prunedm.evaluation.results import Evaluation
from prunedm.record import Record

_LONG = 200  # characters of a list or table that is left to the record


@dataclass(frozen=True)
class StageLine:
    """One stage of the timeline; `start` and `share` are in % of all stages' wall time."""

    name: Words
    labels: list[str]  # the models that it made
    time: Words
    start: float
    share: float
    fields: list[tuple[Words, dict[str, Markup]]]  # groups of the record's fields


@dataclass(frozen=True)
class Failure:
    step: str
    error: str
    labels: list[str]  # the models that go without it


def timeline(evaluations: Sequence[Evaluation]) -> list[StageLine]:
    """The stages in the order of their records, end to end on one time axis."""
    found = lineage_of(evaluations)
    total = sum(record.wall_time_s for record, _ in found)
    stages, passed = [], 0.0
    for record, labels in found:
        start, share = (100 * s / total if total > 0 else 0.0 for s in (passed, record.wall_time_s))
        passed += record.wall_time_s
        name = translated(f"stage.{record.stage}", record.stage)
        time = duration(record.wall_time_s)
        stages.append(StageLine(name, labels, time, start, share, _fields(record)))
    return stages


def total_time(evaluations: Sequence[Evaluation]) -> Words:
    return duration(sum(record.wall_time_s for record, _ in lineage_of(evaluations)))


def failures(evaluations: Sequence[Evaluation]) -> list[Failure]:
    """Every failure once, with the labels of the models it affects."""
    found: dict[tuple[str, str], list[str]] = {}
    for e in evaluations:
        for failure in e.failed.items():
            found.setdefault(failure, []).append(e.label)
    return [Failure(*failure, labels) for failure, labels in found.items()]


def lineage_of(evaluations: Sequence[Evaluation]) -> list[tuple[Record, list[str]]]:
    """Every stage on the way to these models, once, with the labels of the models it made."""
    known: list[tuple[Record, list[str]]] = []
    for e in evaluations:
        for record in e.record.lineage() if e.record else []:
            labels = next((labels for other, labels in known if _same(other, record)), None)
            if labels is None:
                labels = []
                known.append((record, labels))
            if record is e.record:
                labels.append(e.label)
    return known


def duration(seconds: float) -> Words:
    """ "48 s", "12 min 5 s", "3 h 20 min"."""
    if seconds < 60:
        return text("seconds", s=f"{seconds:.3g}")
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return text("minutes", min=minutes, s=rest)
    return text("hours", h=minutes // 60, min=minutes % 60)


def _same(one: Record, other: Record) -> bool:
    return one.identity == other.identity and one.created == other.created


def _fields(record: Record) -> list[tuple[Words, dict[str, Markup]]]:
    """The record's fields as text, in groups."""
    run = {
        text("run.seed"): text("none") if record.seed is None else record.seed,
        text("run.device"): record.device or text("not_recorded"),
        text("run.wall_time"): duration(record.wall_time_s),
        text("run.created"): record.created or text("not_recorded"),
    }
    inputs = {role: f"{source.path}  {source.hash}" for role, source in record.inputs.items()}
    groups: dict[str, dict[Any, Any]] = {
        "run": run,
        "inputs": inputs,
        "options": {name: _brief(value) for name, value in record.options.items()},
        "figures": {name: _brief(value) for name, value in record.figures.items()},
        "versions": record.versions,
    }
    return [
        (text(f"group.{name}"), {escape(k): escape(v) for k, v in pairs.items()})
        for name, pairs in groups.items()
        if pairs
    ]


def _brief(value: Any) -> str:
    """A value as JSON; long lists and tables are left to the record."""
    if isinstance(value, float):
        return f"{value:.6g}"
    written = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text("long") if isinstance(value, (list, dict)) and len(written) > _LONG else written
