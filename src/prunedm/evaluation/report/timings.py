"""Timings: the same call of every model side by side."""

from collections.abc import Sequence
from dataclasses import dataclass

from prunedm.evaluation.results import Evaluation, Timing
from prunedm.evaluation.table import change_in_words

Setting = tuple[int, str, int, bool]  # batch, dtype, threads, compiled


@dataclass(frozen=True)
class TimingRow:
    label: str
    timing: Timing
    change: str  # to the dense model called in the same way
    tone: str  # "better", "worse", or "" within the two spreads


@dataclass(frozen=True)
class TimingBlock:
    """One way to call a denoiser, and every model called so."""

    batch: int
    dtype: str
    threads: int
    compiled: bool
    rows: list[TimingRow]


def timing_blocks(evaluations: Sequence[Evaluation]) -> list[TimingBlock]:
    """The settings in the order in which they first occur; nothing where nothing was timed."""
    blocks: dict[Setting, list[tuple[Evaluation, Timing]]] = {}
    for e in evaluations:
        for timing in e.figures.timings:
            blocks.setdefault(_setting(timing), []).append((e, timing))
    return [
        TimingBlock(*setting, _rows(calls, evaluations[0])) for setting, calls in blocks.items()
    ]


def _setting(timing: Timing) -> Setting:
    return timing.batch, timing.dtype, timing.threads, timing.compiled


def _rows(calls: Sequence[tuple[Evaluation, Timing]], dense: Evaluation) -> list[TimingRow]:
    base = next((t for e, t in calls if e is dense), None)
    device = dense.conditions.device
    rows = []
    for e, t in calls:
        alone = base is None or e is dense or e.conditions.device != device
        rows.append(
            TimingRow(e.label, t, "", "") if base is None or alone else _row(e.label, t, base)
        )
    return rows


def _row(label: str, timing: Timing, base: Timing) -> TimingRow:
    difference = timing.median_ms - base.median_ms
    tone = "better" if difference < 0 else "worse"
    if abs(difference) <= timing.spread_ms + base.spread_ms:
        tone = ""
    return TimingRow(label, timing, change_in_words(timing.median_ms, base.median_ms), tone)
