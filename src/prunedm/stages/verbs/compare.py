"""compare: several models on the same problems and noise; one table, one report."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from prunedm.errors import UserError
from prunedm.evaluation.loss import LOSSES
from prunedm.evaluation.results import Evaluation
from prunedm.folder import Model
from prunedm.learning.logits import groups_changed
from prunedm.options import EvaluateOptions
from prunedm.progress import Progress
from prunedm.reading import check_regular, validated
from prunedm.record import Source
from prunedm.sampling import make_sampler, set_steps
from prunedm.stages.evaluating.files import ROWS, Comparison, without_failures, write_comparison
from prunedm.stages.evaluating.first_masks import masks_comparison
from prunedm.stages.evaluating.measure import (
    SAMPLES,
    Yardstick,
    measure,
    read_evaluation,
    read_images,
    read_steps,
)
from prunedm.stages.evaluating.quality import tasks_for, with_features
from prunedm.stages.evaluating.steps import Steps
from prunedm.stages.evaluating.together import Candidate, pair_with_dense, set_beside, time_in_turns
from prunedm.stages.frame import RESUME, Plan, Request
from prunedm.stages.inputs import data_for, data_source, given_model, model_sources, source_of
from prunedm.system.places import bare
from prunedm.training import processes

_Rows = TypeAdapter(list[Evaluation])


def compare(request: Request[EvaluateOptions]) -> Plan:
    """Evaluate models (label -> folder, the first is the dense one) and write the report.

    Files: see `write_comparison`. Depth "compare" means "full" here, since all models are given.
    Where a step has failed, `overwrite` measures again.
    """
    models, options, progress = request.source, request.options, request.progress
    if not isinstance(models, Mapping):
        raise UserError(
            f"compare takes models by label, as {{'dense': 'digits', ...}}, not {models!r}"
        )
    if not models:
        raise UserError("compare needs at least one model; the first is the one to compare with")
    check_labels(models)
    loaded = {label: given_model(path, options, progress) for label, path in models.items()}
    _check_shapes(loaded)
    inputs: dict[str, Source] = {label: source_of(model) for label, model in loaded.items()}
    inputs |= model_sources(next(iter(loaded.values()))) if options.scheduler else {}
    yard = yardstick(next(iter(loaded.values())), options, progress)
    inputs |= {"held-out images": data_source(yard.reference)} | yard.files

    def make(folder: Path) -> dict[str, Any]:
        middle = [*loaded][1:-1]
        entries = [
            Candidate(label, model, yard.lighter() if label in middle else yard)
            for label, model in loaded.items()
        ]
        title = request.title or "prunedm: dense and pruned models"
        paths = ", ".join(bare(str(path)) for path in models.values())
        rows = study(entries, folder, Steps(), title=title, checkpoint=paths)
        return {"models": list(models), "failed": {r.label: r.failed for r in rows if r.failed}}

    return Plan(options=yard.options, inputs=inputs, make=make, complete=without_failures)


def read_comparison(folder: Path) -> list[Evaluation]:
    """The rows that `compare` or `evaluate` wrote; the first is the dense model."""
    return validated(_Rows, folder / ROWS, "make the report again with --overwrite")


def yardstick(model: Model, options: EvaluateOptions, progress: Progress) -> Yardstick:
    """The common measure of all models. Raises `UserError` for what would fail only after sampling."""
    reference = data_for(model, options, "test", progress)
    options, network, files = with_features(options, reference)
    if model.scheduler is not None:
        sampler = make_sampler(model.scheduler, options.sampler)
        if options.samples:
            set_steps(sampler, options.sampling_steps)
    tasks = tasks_for(model, options)
    return Yardstick(options, reference, network, progress, files, tasks)


def check_labels(labels: Mapping[str, Any]) -> None:
    """Raise `UserError` for a label that cannot be a file name."""
    for label in labels:
        if not label or label in (".", "..") or set(label) & set("/\\\0"):
            raise UserError(f"label {label!r} is not a file name; give one without slashes")


def _check_shapes(models: Mapping[str, Model]) -> None:
    """Raise `UserError` where images or tokens differ: problems and times would not compare."""
    first, *others = models
    for label in others:
        if what := models[label].differs_from(models[first]):
            raise UserError(f"{label} and {first} have other {what}; compare models of one kind")


def study(
    entries: Sequence[Candidate],
    folder: Path,
    steps: Steps,
    *,
    title: str,
    checkpoint: str,
    dense: bool = True,
) -> list[Evaluation]:
    """Measure every entry, then all together, and write the files.

    dense: whether the first entry is the dense model, with which the others are paired. A model that
    was measured before an interruption is not measured again.
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
    time_in_turns(rows, entries, steps)
    if dense:
        set_beside(rows)
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
        paired=pair_with_dense(rows, samples, losses, steps) if dense else {},
        **_masks(entries, rows, samples, losses, steps),
    )
    write_comparison(comparison, folder, steps)
    for line in steps.failures:
        progress.say(f"failed: {line}")
    return rows


def _losses(folder: Path) -> np.ndarray | None:
    path = folder / LOSSES
    return np.load(check_regular(path), allow_pickle=False) if path.exists() else None


def _masks(
    entries: Sequence[Candidate],
    rows: list[Evaluation],
    samples: Mapping[str, np.ndarray],
    losses: Mapping[str, np.ndarray | None],
    steps: Steps,
) -> dict[str, Any]:
    """The learned masks compared with the first ones, if both are entries."""
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
