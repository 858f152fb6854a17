"""The results of a sweep's runs: objectives, the Pareto front, and whole evaluations."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from prunedm.evaluation.results import Evaluation
from prunedm.experiments.plan import Direction, Settings
from prunedm.experiments.store import Run, Status, Store
from prunedm.record import read_record
from prunedm.stages.evaluating.measure import RESULTS, read_evaluation


@dataclass
class Row:
    """A run as the table shows it. values: of the objectives, None where missing."""

    label: str
    settings: Settings
    status: Status
    values: dict[str, float | None]
    run: Run | None = None  # None where its folder is on another machine
    evaluation: Evaluation | None = None
    best: bool = False  # on the Pareto front
    numbers: list[int] = field(default_factory=list)  # of the trials with this run's settings


def row_of(store: Store, run: Run, objectives: Sequence[str]) -> Row:
    status = store.status(run.id)
    if status.state == "running" and not store.is_alive(run.id):
        status = status.model_copy(update={"state": "stopped"})  # killed: continues next time
    values = {name: value_of(store, run, name) for name in objectives}
    evaluation = evaluation_of(store, run.evaluation, run.label)
    return Row(run.label, run.settings, status, values, run, evaluation)


def evaluation_of(store: Store, folder: str, label: str) -> Evaluation | None:
    """The evaluation in a stage's folder under this label; None where there is none yet."""
    path = store.stage(folder)
    if not (path / RESULTS).exists():
        return None
    return read_evaluation(path).model_copy(update={"label": label})


def value_of(store: Store, run: Run, name: str) -> float | None:
    """A figure by name: from the evaluation, STAGE.figure from a record, or the stages' seconds."""
    folders = {stage.name: store.stage(stage.folder) for stage in run.stages}
    if name == "seconds":
        spent = [r.wall_time_s for folder in folders.values() if (r := read_record(folder))]
        return sum(spent) if len(spent) == len(folders) else None
    stage, dot, figure = name.rpartition(".")
    if dot:
        record = read_record(folders[stage]) if stage in folders else None
        return _number(record.figures.get(figure)) if record else None
    evaluation = evaluation_of(store, run.evaluation, run.label)
    if evaluation is None or evaluation.failed:  # in old folders failed counts are 0
        return None
    return _number(getattr(evaluation.figures, name, None))


def mark_best(rows: Sequence[Row], objectives: Mapping[str, Direction]) -> None:
    """Set `best` on the Pareto front: no other row is as good in all objectives and better in one."""
    signs = {name: 1.0 if way == "minimize" else -1.0 for name, way in objectives.items()}
    whole = [row for row in rows if None not in (row.values[name] for name in signs)]
    points = [[sign * (row.values[name] or 0.0) for name, sign in signs.items()] for row in whole]
    for row, point in zip(whole, points, strict=True):
        row.best = not any(_beats(other, point) for other in points)


def _beats(one: Sequence[float], other: Sequence[float]) -> bool:
    return one != other and all(a <= b for a, b in zip(one, other, strict=True))


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
