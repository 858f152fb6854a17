"""What else speaks for the figures: the loss problem by problem, the reload, and asked beside got."""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from prunedm.evaluation.report.words import text
from prunedm.evaluation.results import Asked, Evaluation


@dataclass(frozen=True)
class Check:
    """One model's; an empty string is what was not measured of it."""

    label: str
    change: str  # of the loss against the dense model's, "+0.00060 ± 0.00012"
    tone: str  # "better", "worse", or "" within two standard errors
    reload: Markup | str
    reloads: bool | None
    asked: list[Asked]  # what this model's own pruning was asked for, not its ancestors'


def check_lines(evaluations: Sequence[Evaluation]) -> list[Check]:
    """A line for every model; none where nothing of all this was measured."""
    lines, seen = [], list[Asked]()
    for e in evaluations:
        own = [asked for asked in e.asked if asked not in seen]
        seen += own
        change, tone = _change(e)
        reload = "" if e.reloads is None else text(f"checks.reloads.{e.reloads}")
        lines.append(Check(e.label, change, tone, reload, e.reloads, own))
    return lines if any(c.change or c.reload or c.asked for c in lines) else []


def shown(value: float | str) -> str:
    return f"{value:.4g}" if isinstance(value, float) else value


def _change(e: Evaluation) -> tuple[str, str]:
    change, error = e.figures.loss_change, e.figures.loss_change_se
    if change is None:
        return "", ""
    if error is None:  # of fewer than two pairs of problems
        return f"{change:+.5f}", ""
    tone = "better" if change < 0 else "worse"
    return f"{change:+.5f} ± {error:.5f}", tone if abs(change) > 2 * error else ""
