"""Measurements across models: latencies in turns, and comparisons with the dense model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from prunedm.evaluation.loss import LOSS, LossEstimate
from prunedm.evaluation.paired import PAIRED, PSNR, median_error
from prunedm.evaluation.results import Evaluation, Timing
from prunedm.evaluation.speed import Way, timings
from prunedm.evaluation.table import changes, comparable
from prunedm.folder import Model
from prunedm.stages.evaluating.measure import Yardstick, batches_of
from prunedm.stages.evaluating.steps import Steps
from prunedm.stages.inputs import device_for
from prunedm.tables import METRICS


@dataclass(frozen=True)
class Candidate:
    """A model to measure under a label; `shown` is its name in results where its folder is temporary."""

    label: str
    model: Model
    yard: Yardstick
    shown: str = ""
    first_masks: bool = False  # the last entry's model before mask learning


def time_in_turns(rows: list[Evaluation], entries: Sequence[Candidate], steps: Steps) -> None:
    """Latencies of all models in turns: times taken minutes apart do not compare."""
    options = entries[-1].yard.options
    ways = [Way(batch) for batch in batches_of(options)]
    if options.depth == "comprehensive":
        ways += [Way(options.latency_batch, **{how: True}) for how in ("bf16", "compiled")]
    for number, way in enumerate(ways):
        name = str(way) if number else "latency"
        found, errors = _in_turns(name, way, entries, steps)
        for row in rows:
            timing = found.get(row.label)
            if timing is None:
                row.failed[name] = errors[row.label]
                continue
            row.figures.timings.append(timing)
            if number == 0:
                row.figures.latency_ms = timing.median_ms
                row.figures.latency_spread_ms = timing.spread_ms


def _in_turns(
    name: str, way: Way, entries: Sequence[Candidate], steps: Steps
) -> tuple[dict[str, Timing], dict[str, str]]:
    """Timings and errors by label. Models that fail on their own are left out of the others' turns."""
    options = entries[-1].yard.options

    def work(chosen: Sequence[Candidate], repeats: int) -> list[Timing]:
        return timings(
            [(entry.model.denoiser, entry.model.example(way.batch)) for entry in chosen],
            way,
            repeats=repeats,
            device=device_for(options.device),
        )

    together = Steps()
    found = together.take(name, partial(work, entries, options.latency_repeats))
    if found is not None:
        steps.taken += together.taken
        return {e.label: timing for e, timing in zip(entries, found, strict=True)}, {}
    alone = {entry.label: Steps(entry.label) for entry in entries}
    for entry in entries if len(entries) > 1 else []:
        alone[entry.label].take(name, partial(work, [entry], 1))
    able = [entry for entry in entries if not alone[entry.label].failed]
    if len(able) in (0, len(entries)):
        steps.taken += together.taken
        return {}, {entry.label: together.failed[name] for entry in entries}
    broken = [own for own in alone.values() if own.failed]
    steps.taken += [step for own in broken for step in own.taken]
    timed, errors = _in_turns(name, way, able, steps)
    return timed, errors | {own.model: own.failed[name] for own in broken}


def set_beside(rows: Sequence[Evaluation]) -> None:
    """Add the dense model's figures, and the changes from them, to every other row."""
    dense = rows[0]
    for row in rows[1:]:
        if row.figures.bytes_packed and dense.figures.bytes_packed:
            row.figures.compression = dense.figures.bytes_packed / row.figures.bytes_packed
        row.dense, row.changes = dense.figures, changes(row, dense)


def pair_with_dense(
    rows: list[Evaluation],
    samples: Mapping[str, np.ndarray],
    losses: Mapping[str, np.ndarray | None],
    steps: Steps,
) -> dict[str, dict[str, np.ndarray]]:
    """Compare every model with the dense one, problem by problem and image by image.

    Returns the values by image, by label and metric; the rows get the summary figures.
    """
    paired, dense = {}, rows[0].label
    for row in rows[1:]:
        before_N, after_N = losses[dense], losses[row.label]
        # under another noise schedule the problems differ
        if before_N is not None and after_N is not None and comparable(LOSS, row, rows[0]):
            change = LossEstimate.of(torch.from_numpy(after_N) - torch.from_numpy(before_N))
            setattr(row.figures, LOSS.change, change.mean)
            setattr(row.figures, f"{LOSS.change}_se", change.standard_error)
        if dense in samples and row.label in samples:
            count = min(len(samples[row.label]), len(samples[dense]))
            pair = samples[row.label][:count], samples[dense][:count]
            own = Steps(row.label)
            paired[row.label] = own.take(PAIRED.step, partial(_each, *pair)) or {}
            steps.taken += own.taken
            row.failed |= own.failed
            _note_pairs(row, paired[row.label])
    return paired


def _each(images_NHWC: np.ndarray, dense_NHWC: np.ndarray) -> dict[str, np.ndarray]:
    """Every paired metric, image by image."""
    return {m.key: m.each(images_NHWC, dense_NHWC) for m in METRICS.values() if m.each}


def _note_pairs(row: Evaluation, found: Mapping[str, np.ndarray]) -> None:
    """Enter the medians and their errors; neither where most images are identical."""
    for key, values_N in found.items():
        if np.isfinite(np.median(values_N)):
            setattr(row.figures, key, float(np.median(values_N)))
            if len(values_N) > 1:  # one image has no spread
                error = median_error(np.minimum(values_N, 1e3))
                setattr(row.figures, METRICS[key].spread, error)
    if PSNR.key in found:
        row.figures.identical = float(np.isinf(found[PSNR.key]).mean())
