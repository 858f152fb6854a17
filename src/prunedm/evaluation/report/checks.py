"""Checks beside the figures: the loss problem by problem, the reload, and targets asked and reached."""

from collections.abc import Sequence
from dataclasses import dataclass

from prunedm.evaluation.report.words import Words, text
from prunedm.evaluation.results import Asked, Evaluation
from prunedm.evaluation.table import Tone, tone_of
from prunedm.tables import METRICS


@dataclass(frozen=True)
class Check:
    """One model's; empty where not measured."""

    label: str
    change: str  # of the loss to the dense model's, "+0.00060 ± 0.00012"
    tone: Tone  # "" within two standard errors
    reload: Words | None
    reloads: bool | None
    asked: list[Asked]  # targets of this model's own pruning, not of its ancestors'


def check_lines(evaluations: Sequence[Evaluation]) -> list[Check]:
    """One line per model; none where nothing was checked."""
    lines, seen = [], list[Asked]()
    for e in evaluations:
        own = [asked for asked in e.asked if asked not in seen]
        seen += own
        reload = None if e.reloads is None else text(f"checks.reloads.{e.reloads}")
        lines.append(Check(e.label, *_change(e), reload, e.reloads, own))
    return lines if any(c.change or c.reload or c.asked for c in lines) else []


def _change(e: Evaluation) -> tuple[str, Tone]:
    name = METRICS["loss"].change
    change, error = getattr(e.figures, name), getattr(e.figures, f"{name}_se")
    if change is None:
        return "", ""
    if error is None:  # fewer than two pairs of problems
        return f"{change:+.5f}", ""
    return f"{change:+.5f} ± {error:.5f}", tone_of(change, 2 * error)
