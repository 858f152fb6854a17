"""The files of `evaluate` and `compare`."""

import csv
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from prunedm.evaluation.dashboard import dashboard, layer_chart, sparse
from prunedm.evaluation.pictures import grid
from prunedm.evaluation.report import write_report
from prunedm.evaluation.results import Evaluation, LayerSparsity, Timing
from prunedm.evaluation.summary import comparison_text, ssim_note, summary_text
from prunedm.evaluation.table import csv_text
from prunedm.options import EvaluateOptions
from prunedm.reading import RECORD_LIMIT, read_object
from prunedm.record import write_json
from prunedm.stages.evaluating.steps import Steps

ROWS = "detailed_results.json"
REPORT = "report.html"
SUMMARY = "evaluation_summary.md"
WORKFLOW = "workflow_results.json"
SAMPLES_FOLDER = "samples"
SHOWN = 12  # images of each model side by side


@dataclass(frozen=True)
class Comparison:
    """All that is written; everything by label, the dense model first."""

    title: str
    checkpoint: str
    options: EvaluateOptions
    rows: Sequence[Evaluation]
    samples: Mapping[str, np.ndarray]
    losses: Mapping[str, np.ndarray | None]
    paired: Mapping[str, Mapping[str, np.ndarray]]  # metric -> likeness to dense, by image
    masks: dict[str, Any] = field(default_factory=dict)  # of `masks_comparison`
    masks_of: tuple[str, str] | None = None  # labels: first, learned


def write_comparison(found: Comparison, folder: Path, steps: Steps) -> None:
    """Everything but `evaluation_results.json`; a file that cannot be made is a failed step.

    `detailed_results.json`, `comparison_table.csv`, `comparison_report.md`, `report.html`,
    `comparison_dashboard.png`, `evaluation_summary.md`, `workflow_results.json`; `samples/` with an
    .npz and a sheet a model; `metrics/` with losses by problem, layers, timings and likenesses, and
    `masks_comparison.json` of a learned model; `visualizations/`.
    """
    for name in (SAMPLES_FOLDER, "metrics", "visualizations"):
        (folder / name).mkdir(exist_ok=True)
    rows = found.rows
    for label, images in found.samples.items():
        np.savez(folder / SAMPLES_FOLDER / f"{label}.npz", images=images)
    for row in rows:
        row.samples_file = f"{SAMPLES_FOLDER}/{row.label}.npz" if row.label in found.samples else ""
    _metrics(found, folder / "metrics")
    write_json([row.model_dump(mode="json") for row in rows], folder / ROWS)
    (folder / "comparison_table.csv").write_text(csv_text(rows), encoding="utf-8")
    (folder / "comparison_report.md").write_text(comparison_text(rows), encoding="utf-8")
    for name, work in _pictures(found, folder).items():
        steps.take(name, work)
    steps.take(
        "report",
        lambda: write_report(rows, found.samples, folder / REPORT, title=found.title),
    )
    sizes = [images.shape[1:3] for images in found.samples.values()] if found.paired else []
    notes = [ssim_note(size) for size in sizes[:1]]
    summary = summary_text(found.title, rows, steps.taken, steps.failures, notes=notes)
    (folder / SUMMARY).write_text(summary, encoding="utf-8")
    write_json(_workflow(found, steps), folder / WORKFLOW)


def without_failures(folder: Path) -> bool:
    """Whether every step of a finished folder was done."""
    return not read_object(folder / WORKFLOW, limit=RECORD_LIMIT).get("failed", True)


def _workflow(found: Comparison, steps: Steps) -> dict[str, Any]:
    return {
        "timestamp": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "checkpoint": found.checkpoint,
        "hash": found.rows[-1].hash,
        "models": {row.label: row.hash for row in found.rows},
        "depth": found.options.depth,
        "failed": len(steps.failures),
        "steps": [step.model_dump(mode="json") for step in steps.taken],
    }


def _pictures(found: Comparison, folder: Path) -> dict[str, Callable[[], object]]:
    """How each picture is made, by the name of its step."""
    place = folder / "visualizations"
    made: dict[str, Callable[[], object]] = {
        "dashboard": lambda: dashboard(found.rows, folder / "comparison_dashboard.png")
    }
    if sparse(found.rows):
        made["layer chart"] = lambda: layer_chart(found.rows, place / "layers.png")
    if found.samples:
        made["sheets"] = lambda: _sheets(found.samples, folder / SAMPLES_FOLDER)
        drawn = list(found.samples.values())
        made["side by side"] = lambda: _side_by_side(drawn, place / "side_by_side.png")
    if found.masks_of and found.samples.keys() >= set(found.masks_of):
        pair = [found.samples[label] for label in found.masks_of]
        made["masks side by side"] = lambda: _side_by_side(pair, place / "masks.png")
    return made


def _sheets(samples: Mapping[str, np.ndarray], place: Path) -> None:
    for label, images in samples.items():
        grid(images[:64], 8).save(place / f"{label}.png")


def _side_by_side(images: Sequence[np.ndarray], path: Path) -> None:
    """A row of images a model, a column a noise."""
    count = min([SHOWN, *(len(own) for own in images)])
    grid(np.concatenate([own[:count] for own in images]), count).save(path)


def _metrics(found: Comparison, place: Path) -> None:
    for label, losses in found.losses.items():
        if losses is not None:
            np.save(place / f"loss-{label}.npy", losses, allow_pickle=False)
    layers = [
        (row.label, layer.model_dump(mode="json")) for row in found.rows for layer in row.layers
    ]
    _table(place / "layers.csv", LayerSparsity.model_fields, layers)
    timings = [(row.label, t.model_dump()) for row in found.rows for t in row.figures.timings]
    fields = [*Timing.model_fields, *Timing.model_computed_fields]
    _table(place / "timings.csv", fields, timings)
    likeness = {label: _paired(pairs) for label, pairs in found.paired.items() if pairs}
    if likeness:
        size = next(iter(found.samples.values())).shape[1:3]
        write_json({"note": ssim_note(size), "models": likeness}, place / "paired.json")
    if found.masks:
        write_json(found.masks, place / "masks_comparison.json")


def _paired(pairs: Mapping[str, np.ndarray]) -> dict[str, list[float | None]]:
    """By image; null is infinity, of the same images."""
    return {
        key: [value if np.isfinite(value) else None for value in values_N.tolist()]
        for key, values_N in pairs.items()
    }


def _table(path: Path, fields: Iterable[str], lines: Iterable[tuple[str, dict[str, Any]]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["model", *fields], lineterminator="\n")
        writer.writeheader()
        for label, values in lines:
            shape = values.get("shape")
            text = {"shape": "x".join(map(str, shape))} if shape is not None else {}
            writer.writerow({"model": label} | values | text)
