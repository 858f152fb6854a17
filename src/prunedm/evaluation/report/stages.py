"""How the models were made: every stage once, with its record and its share of the time."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup, escape

from prunedm.evaluation.report.words import text, translated
from prunedm.evaluation.results import Evaluation
from prunedm.record import Record

_LONG = 200  # letters of a list or table
Fields = dict[str, Markup]  # a field of the record -> its value


@dataclass(frozen=True)
class StageLine:
    """One stage of the timeline; `start` and `share` are parts of all stages' wall time, in %."""

    name: Markup
    labels: list[str]  # of the models it made
    time: Markup
    start: float
    share: float
    fields: list[tuple[Markup, Fields]]


@dataclass(frozen=True)
class Failure:
    step: str
    error: str
    labels: list[str]


def timeline(evaluations: Sequence[Evaluation]) -> list[StageLine]:
    """The stages in the order of their records, one after another on one axis of time."""
    found = lineage_of(evaluations)
    total = sum(record.wall_time_s for record, _ in found)
    stages, passed = [], 0.0
    for record, labels in found:
        start, share = (100 * s / total if total > 0 else 0.0 for s in (passed, record.wall_time_s))
        passed += record.wall_time_s
        time = duration(record.wall_time_s)
        stages.append(
            StageLine(
                translated(f"stage.{record.stage}", record.stage),
                labels,
                time,
                start,
                share,
                _fields(record),
            )
        )
    return stages


def total_time(evaluations: Sequence[Evaluation]) -> Markup:
    return duration(sum(record.wall_time_s for record, _ in lineage_of(evaluations)))


def failures(evaluations: Sequence[Evaluation]) -> list[Failure]:
    """What went wrong, once, with the labels of the models that go without it."""
    found: dict[tuple[str, str], list[str]] = {}
    for e in evaluations:
        for step, error in e.failed.items():
            found.setdefault((step, error), []).append(e.label)
    return [Failure(step, error, labels) for (step, error), labels in found.items()]


def lineage_of(evaluations: Sequence[Evaluation]) -> list[tuple[Record, list[str]]]:
    """Every stage on the way to these models, once, with the labels of the models it made."""
    known: list[tuple[Record, list[str]]] = []
    for e in evaluations:
        for record in e.record.lineage() if e.record else []:
            found = [entry for entry in known if _same(entry[0], record)]
            labels = found[0][1] if found else []
            if not found:
                known.append((record, labels))
            if record is e.record:
                labels.append(e.label)
    return known


def duration(seconds: float) -> Markup:
    """ "48 s", "12 min 5 s", "3 h 20 min"."""
    if seconds < 60:
        return text("seconds", s=f"{seconds:.3g}")
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return text("minutes", min=minutes, s=rest)
    return text("hours", h=minutes // 60, min=minutes % 60)


def _same(one: Record, other: Record) -> bool:
    return one.identity == other.identity and one.created == other.created


def _fields(record: Record) -> list[tuple[Markup, Fields]]:
    """A record as text: what its <details> list."""
    run = {
        text("run.seed"): text("none") if record.seed is None else escape(record.seed),
        text("run.device"): escape(record.device or text("not_recorded")),
        text("run.wall_time"): duration(record.wall_time_s),
        text("run.created"): escape(record.created or text("not_recorded")),
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


def _brief(value: Any) -> str | Markup:
    """A value as JSON; long lists and tables are left to the record itself."""
    if isinstance(value, float):
        return f"{value:.6g}"
    written = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if isinstance(value, (list, dict)) and len(written) > _LONG:
        return text("long")
    return written
