"""compare: several models on the same problems and the same noise; one table, one report."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter

from prunedm.errors import UserError
from prunedm.evaluation.loss import LossEstimate
from prunedm.evaluation.paired import median_error, psnr, ssim
from prunedm.evaluation.results import Evaluation
from prunedm.evaluation.speed import Way, timings
from prunedm.folder import Model, load
from prunedm.learning.logits import groups_changed
from prunedm.options import EvaluateOptions
from prunedm.progress import Progress, Silent
from prunedm.record import Record, Source
from prunedm.sampling import make_sampler
from prunedm.stages.comparison_files import (
    REPORT,
    ROWS,
    SUMMARY,
    Comparison,
    Paired,
    write_comparison,
)
from prunedm.stages.first_masks import masks_comparison
from prunedm.stages.frame import RESUME, run_stage
from prunedm.stages.inputs import data_source, device_for, images_for, source_of
from prunedm.stages.measure import (
    LOSSES,
    SAMPLES,
    Yardstick,
    batches_of,
    measure,
    read_evaluation,
    read_images,
    read_steps,
)
from prunedm.stages.quality import with_features
from prunedm.stages.steps import Steps
from prunedm.training import processes

__all__ = [
    "REPORT",
    "SUMMARY",
    "Entry",
    "check_labels",
    "compare",
    "read_comparison",
    "study",
    "yardstick",
]
_Rows = TypeAdapter(list[Evaluation])


@dataclass(frozen=True)
class Entry:
    """A model to measure under a label; `shown` is its name where its folder will be gone."""

    label: str
    model: Model
    yard: Yardstick
    shown: str = ""
    first_masks: bool = False  # the last entry's weights under the masks that it began with


def compare(
    models: Mapping[str, str | Path],
    out: str | Path,
    options: EvaluateOptions = EvaluateOptions(),
    *,
    title: str = "",
    progress: Progress | None = None,
    overwrite: bool = False,
) -> tuple[Record, bool]:
    """Evaluate `models` (label -> folder, the first is the dense one) and write the report.

    Files: see `write_comparison`. Depth "compare" is "full" here, as all models are given.
    """
    if not models:
        raise UserError("compare needs at least one model; the first is the one to compare with")
    check_labels(models)
    progress = progress or Silent()
    loaded = {label: load(path) for label, path in models.items()}
    inputs: dict[str, Source] = {label: source_of(model) for label, model in loaded.items()}
    yard = yardstick(next(iter(loaded.values())), options, progress)
    inputs["held-out images"] = data_source(yard.reference)

    def make(folder: Path) -> dict[str, Any]:
        entries = [Entry(label, model, yard) for label, model in loaded.items()]
        name = title or "prunedm: dense and pruned models"
        paths = ", ".join(map(str, models.values()))
        rows = study(entries, folder, Steps(), title=name, checkpoint=paths)
        return {"models": list(models), "failed": {r.label: r.failed for r in rows if r.failed}}

    return run_stage("compare", out, options=options, inputs=inputs, make=make, overwrite=overwrite)


def read_comparison(folder: Path) -> list[Evaluation]:
    """The rows that `compare` or `evaluate` wrote; the first is the dense model."""
    return _Rows.validate_json((folder / ROWS).read_text(encoding="utf-8"))


def yardstick(model: Model, options: EvaluateOptions, progress: Progress) -> Yardstick:
    """Raises `UserError` for what would fail only after the samples are drawn."""
    reference = images_for(model, options, "test")
    options, network = with_features(options, reference)
    make_sampler(model.scheduler, options.sampler)
    return Yardstick(options, reference, network, progress)


def check_labels(labels: Mapping[str, Any]) -> None:
    """Raise `UserError` for a label that is no name of a file."""
    for label in labels:
        if not label or label in (".", "..") or set(label) & set("/\\\0"):
            raise UserError(f"label {label!r} is no name of a file; give one without slashes")


def study(
    entries: Sequence[Entry],
    folder: Path,
    steps: Steps,
    *,
    title: str,
    checkpoint: str,
) -> list[Evaluation]:
    """Measure every entry, then all together, and write the files; the first is the dense one.

    A model that was measured before an interruption is not measured again.
    """
    progress = entries[-1].yard.progress
    done = folder / RESUME / "evaluations"
    for entry in entries:
        progress.say(f"evaluating {entry.label}")
        measure(entry.model, done / entry.label, entry.label, entry.yard)
    rows = [read_evaluation(done / entry.label) for entry in entries]
    for row, entry in zip(rows, entries, strict=True):
        row.model = entry.shown or row.model
    if processes.rank() > 0:
        return rows
    own = [step for entry in entries for step in read_steps(done / entry.label)]
    steps.taken += own
    _time(rows, entries, steps)
    drawn = {e.label: read_images(done / e.label / SAMPLES) for e in entries}
    samples = {label: images for label, images in drawn.items() if images is not None}
    losses = {e.label: _losses(done / e.label) for e in entries}
    comparison = Comparison(
        title=title,
        checkpoint=checkpoint,
        options=entries[-1].yard.options,
        rows=rows,
        samples=samples,
        losses=losses,
        paired=_pair(rows, samples, losses, steps),
        **_masks(entries, rows, samples, losses, steps),
    )
    write_comparison(comparison, folder, steps)
    for line in steps.failures:
        progress.say(f"failed: {line}")
    return rows


def _losses(folder: Path) -> np.ndarray | None:
    path = folder / LOSSES
    return np.load(path, allow_pickle=False) if path.exists() else None


def _time(rows: list[Evaluation], entries: Sequence[Entry], steps: Steps) -> None:
    """Latencies of all models in turns: times minutes apart do not compare."""
    options = entries[-1].yard.options
    ways = [Way(batch) for batch in batches_of(options)]
    if options.depth == "comprehensive":
        ways += [
            Way(options.latency_batch, bf16=True),
            Way(options.latency_batch, compiled=True),
        ]
    for number, way in enumerate(ways):
        name = str(way) if number else "latency"

        def work(way: Way = way) -> list[Any]:
            return timings(
                [entry.model.denoiser for entry in entries],
                entries[0].model.sample_shape,
                way,
                repeats=options.latency_repeats,
                device=device_for(options.device),
            )

        found = steps.take(name, work)
        for row, timing in zip(rows, found or [None] * len(rows), strict=True):
            if timing is None:
                row.failed[name] = steps.failed[name]
                continue
            row.figures.timings.append(timing)
            if number == 0:
                row.figures.latency_ms = timing.median_ms
                row.figures.latency_spread_ms = timing.spread_ms


def _pair(
    rows: list[Evaluation],
    samples: Mapping[str, np.ndarray],
    losses: Mapping[str, np.ndarray | None],
    steps: Steps,
) -> dict[str, Paired]:
    """What differs from the dense model, image by image and problem by problem."""
    paired, dense = {}, rows[0].label
    for row in rows[1:]:
        found = Paired()
        both = losses[dense], losses[row.label]
        if both[0] is not None and both[1] is not None:
            change = LossEstimate.of(torch.from_numpy(both[1]) - torch.from_numpy(both[0]))
            row.figures.loss_change = change.mean
            row.figures.loss_change_se = change.standard_error
        if dense in samples and row.label in samples:
            pair = samples[row.label], samples[dense]
            taken = steps.take("paired", lambda pair=pair: Paired(psnr(*pair), ssim(*pair)))  # type: ignore[misc]
            if taken is None:
                row.failed["paired"] = steps.failed["paired"]
            else:
                found = taken
                _note_pairs(row, found)
        paired[row.label] = found
    return paired


def _masks(
    entries: Sequence[Entry],
    rows: list[Evaluation],
    samples: Mapping[str, np.ndarray],
    losses: Mapping[str, np.ndarray | None],
    steps: Steps,
) -> dict[str, Any]:
    """The learned masks against the first ones, where both are there."""
    number = next((k for k, entry in enumerate(entries) if entry.first_masks), None)
    if number is None:
        return {}
    first, learned = rows[number], rows[-1]
    labels = first.label, learned.label

    def work() -> dict[str, Any]:
        before, after = entries[number].model.masks, entries[-1].model.masks
        assert before is not None
        assert after is not None
        return masks_comparison(
            first,
            learned,
            changed=groups_changed(before, after),
            losses=[losses[label] for label in labels],
            samples=[samples.get(label) for label in labels],
        )

    return {"masks": steps.take("masks comparison", work) or {}, "masks_of": labels}


def _note_pairs(row: Evaluation, found: Paired) -> None:
    assert found.psnr_N is not None
    assert found.ssim_N is not None
    figures = row.figures
    figures.ssim, figures.ssim_se = float(np.median(found.ssim_N)), median_error(found.ssim_N)
    if np.isfinite(np.median(found.psnr_N)):  # inf: the same images
        finite_N = np.minimum(found.psnr_N, 1e3)
        figures.psnr_db, figures.psnr_se = float(np.median(found.psnr_N)), median_error(finite_N)
