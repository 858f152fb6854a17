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
from prunedm.evaluation.results import Evaluation, LayerFigures, Timing
from prunedm.evaluation.summary import comparison_text, summary_text
from prunedm.evaluation.table import csv_text
from prunedm.options import EvaluateOptions
from prunedm.reading import RECORD_LIMIT, read_object
from prunedm.record import write_json
from prunedm.stages.evaluating.steps import Steps
from prunedm.tables import METRICS

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
    paired: Mapping[str, Mapping[str, np.ndarray]]  # metric -> its values to dense, by image
    masks: dict[str, Any] = field(default_factory=dict)  # of `masks_comparison`
    masks_of: tuple[str, str] | None = None  # labels: first, learned

    @property
    def notes(self) -> list[str]:
        """Caveats of the paired metrics for images of this size."""
        size = next((images.shape[1:3] for images in self.samples.values()), None)
        if not self.paired or size is None:
            return []
        return [note for m in METRICS.values() if m.each and (note := m.note(size))]


def write_comparison(found: Comparison, folder: Path, steps: Steps) -> None:
    """Everything but `evaluation_results.json`; a file that cannot be made is a failed step.

    `detailed_results.json`, `comparison_table.csv`, `comparison_report.md`, `report.html`,
    `comparison_dashboard.png`, `evaluation_summary.md`, `workflow_results.json`; `samples/` with an
    .npz and a sheet per model; `metrics/` with losses by problem, layers, timings, paired values by
    image, and `masks_comparison.json` of a learned model; `visualizations/`.
    """
    for name in (SAMPLES_FOLDER, "metrics", "visualizations"):
        (folder / name).mkdir(exist_ok=True)
    rows = found.rows
    for label, images in found.samples.items():
        np.savez(folder / SAMPLES_FOLDER / f"{label}.npz", images=images)
    for row in rows:
        row.samples_file = f"{SAMPLES_FOLDER}/{row.label}.npz" if row.label in found.samples else ""
    _write_metrics(found, folder / "metrics")
    write_json([row.model_dump(mode="json") for row in rows], folder / ROWS)
    (folder / "comparison_table.csv").write_text(csv_text(rows), encoding="utf-8")
    (folder / "comparison_report.md").write_text(comparison_text(rows), encoding="utf-8")
    for name, work in _pictures(found, folder).items():
        steps.take(name, work)
    summary = summary_text(found.title, rows, steps.taken, steps.failures, notes=found.notes)
    (folder / SUMMARY).write_text(summary, encoding="utf-8")
    workflow = {
        "timestamp": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "checkpoint": found.checkpoint,
        "hash": rows[-1].hash,
        "models": {row.label: row.hash for row in rows},
        "depth": found.options.depth,
        "failed": len(steps.failures),
        "steps": [step.model_dump(mode="json") for step in steps.taken],
    }
    write_json(workflow, folder / WORKFLOW)


def without_failures(folder: Path) -> bool:
    """Whether every step of a finished folder was done."""
    return not read_object(folder / WORKFLOW, limit=RECORD_LIMIT).get("failed", True)


def _pictures(found: Comparison, folder: Path) -> dict[str, Callable[[], object]]:
    """What makes each picture, and the report, by the name of its step."""
    place, rows, samples = folder / "visualizations", found.rows, found.samples
    made: dict[str, Callable[[], object]] = {
        "dashboard": lambda: dashboard(rows, folder / "comparison_dashboard.png")
    }
    if sparse(rows):
        made["layer chart"] = lambda: layer_chart(rows, place / "layers.png")
    if samples:
        made["sheets"] = lambda: _sheets(samples, folder / SAMPLES_FOLDER)
        made["side by side"] = lambda: _side_by_side(
            list(samples.values()), place / "side_by_side.png"
        )
    if found.masks_of and samples.keys() >= set(found.masks_of):
        pair = [samples[label] for label in found.masks_of]
        made["masks side by side"] = lambda: _side_by_side(pair, place / "masks.png")
    made["report"] = lambda: write_report(rows, samples, folder / REPORT, title=found.title)
    return made


def _sheets(samples: Mapping[str, np.ndarray], place: Path) -> None:
    for label, images in samples.items():
        grid(images[:64], 8).save(place / f"{label}.png")


def _side_by_side(images: Sequence[np.ndarray], path: Path) -> None:
    """One row of images per model, one column per noise."""
    count = min([SHOWN, *(len(own) for own in images)])
    grid(np.concatenate([own[:count] for own in images]), count).save(path)


def _write_metrics(found: Comparison, place: Path) -> None:
    for label, losses in found.losses.items():
        if losses is not None:
            np.save(place / f"loss-{label}.npy", losses, allow_pickle=False)
    layers = [
        layer.model_dump() | {"model": row.label, "shape": "x".join(map(str, layer.shape))}
        for row in found.rows
        for layer in row.layers
    ]
    _write_csv(place / "layers.csv", LayerFigures.model_fields, layers)
    timings = [
        t.model_dump() | {"model": row.label} for row in found.rows for t in row.figures.timings
    ]
    fields = [*Timing.model_fields, *Timing.model_computed_fields]
    _write_csv(place / "timings.csv", fields, timings)
    paired = {label: _by_image(values) for label, values in found.paired.items() if values}
    if paired:
        write_json({"note": " ".join(found.notes), "models": paired}, place / "paired.json")
    if found.masks:
        write_json(found.masks, place / "masks_comparison.json")


def _by_image(values: Mapping[str, np.ndarray]) -> dict[str, list[float | None]]:
    """By metric; null stands for infinity, of identical images."""
    return {
        key: [value if np.isfinite(value) else None for value in values_N.tolist()]
        for key, values_N in values.items()
    }


def _write_csv(path: Path, fields: Iterable[str], lines: Iterable[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["model", *fields], lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
