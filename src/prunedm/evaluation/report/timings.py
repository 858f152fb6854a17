"""Timings: the same call of every model side by side."""

from collections.abc import Sequence
from dataclasses import dataclass

from prunedm.evaluation.results import Evaluation, Timing
from prunedm.evaluation.table import Tone, change_in_words, tone_of


@dataclass(frozen=True)
class TimingRow:
    label: str
    timing: Timing
    change: str = ""  # to the dense model called in the same way
    tone: Tone = ""  # "" within the two spreads


def timing_blocks(evaluations: Sequence[Evaluation]) -> list[list[TimingRow]]:
    """One block per way to call a denoiser, in the order of first occurrence."""
    blocks: dict[tuple[object, ...], list[TimingRow]] = {}
    bases: dict[tuple[object, ...], Timing] = {}  # the dense model's
    dense = evaluations[0]
    for e in evaluations:
        for t in e.figures.timings:
            way = t.batch, t.dtype, t.threads, t.compiled
            if e is dense:
                bases.setdefault(way, t)
            like = e is not dense and e.conditions.device == dense.conditions.device
            base = bases.get(way) if like else None
            blocks.setdefault(way, []).append(_row(e.label, t, base))
    return list(blocks.values())


def _row(label: str, timing: Timing, base: Timing | None) -> TimingRow:
    if base is None:
        return TimingRow(label, timing)
    change = change_in_words(timing.median_ms, base.median_ms)
    noise = timing.spread_ms + base.spread_ms
    return TimingRow(label, timing, change, tone_of(timing.median_ms - base.median_ms, noise))
